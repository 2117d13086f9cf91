"""Fine-tunes question answering: which words of a source say what a function does, and takes?

    python examples/finetune_question_answering.py [--max-length 192] [--steps 60] [--rows 400]
        [--train-data train.jsonl --eval-data eval.jsonl] [--model FOLDER]

Your own data is as in SQuAD: "question", "context", and "answers" of "text" and "answer_start".
Without it a context is a function of Python's library. The answer to "What does NAME do?" is the
first line of its docstring, the answer to "What does NAME take?" its arguments. For the function
shown, both questions then get the docstring: more steps are needed.
"""

import ast
import pathlib
import tempfile
from collections.abc import Iterator

from finetune_data import parse, settings_of

import lsg_flax
from lsg_flax.training import Finetuned, finetune

EXAMPLE = '''def half(number, digits):
    """Return half of a number, rounded."""
    return round(number / 2, digits)
'''


def rows(sources) -> Iterator[dict]:
    """One row per function with arguments and a docstring, with either question in turn."""
    for _, text in sources:
        try:
            nodes, lines = list(ast.walk(ast.parse(text))), text.split("\n")
        except SyntaxError:
            continue  # a file of the library's tests that is broken on purpose
        for number, node in enumerate(n for n in nodes if isinstance(n, ast.FunctionDef)):
            source, about = (
                "\n".join(lines[node.lineno - 1 : node.end_lineno]),
                ast.get_docstring(node),
            )
            takes = source.partition("(")[2].partition(")")[0].strip()
            does = (about or "").split("\n")[0].strip()
            asks, answer = (("do", does), ("take", takes))[number % 2]
            if does and takes and answer in source:
                place = source.index(answer)
                yield {
                    "question": f"What does {node.name} {asks}?",
                    "context": source,
                    "answers": {"text": [answer], "answer_start": [place]},
                }


def main(arguments: list[str] | None = None) -> Finetuned:
    """Trains, and asks the best model about a function that it has not seen."""
    options = parse(
        __doc__, arguments, max_length=192, steps=60, batch_size=8, learning_rate=3e-4, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(
            options,
            rows,
            pathlib.Path(folder),
            task="question_answering",
            stride=32,
            best="eval_f1",
            evaluate_every=max(options.steps // 2, 1),
        )
        result = finetune(settings)
        print(f"after step {result.step}:")
        print(", ".join(f"{name} {value:.3f}" for name, value in result.scores.items()))
        ask = lsg_flax.pipeline("question-answering", str(result.output / "best"))
        for question in ("What does half do?", "What does half take?"):
            answer = ask(question=question, context=EXAMPLE)
            print(f"{question} {answer['answer']!r} ({answer['score']:.2f})")
    return result


if __name__ == "__main__":
    main()
