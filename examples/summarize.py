"""Summarises long documents: text files, a JSONL, or papers of aclsum.

    python examples/summarize.py --model ccdv/lsg-bart-base-4096-arxiv [--input papers/]
    python examples/summarize.py --model facebook/bart-large-cnn --convert 4096
    python examples/summarize.py    # without a network: an untrained model, whose words are noise

The model is any BART, mBART or Pegasus, plain or LSG, folder or hub id. --convert makes a plain one
read that many tokens. --input is a folder of .txt, a .txt with a document per line, or a .jsonl
with "text"; the default is the first papers of aclsum's test split. For many documents use
`lsg-flax summarize`, which does the same and resumes after a kill.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Iterator

from aclsum_papers import read_papers
from at_hand import write_jsonl
from small_bart import write_small_bart

import lsg_flax
from lsg_flax import hub
from lsg_flax.pipelines import DocumentFile, Pipeline


def summarizer(model: str, options: argparse.Namespace) -> Pipeline:
    """The pipeline of a checkpoint, made to read `options.convert` tokens if that is given."""
    tokenizer = hub.open_checkpoint(model).tokenizer
    if options.convert:
        loaded = lsg_flax.convert_checkpoint(model, max_sequence_length=options.convert)
    else:
        loaded = lsg_flax.from_pretrained(model)
    return lsg_flax.pipeline(
        "summarization",
        loaded,
        tokenizer,
        truncation=True,  # what the model does not read is cut off
        batch_size=options.batch_size,
        num_beams=options.num_beams,
        max_length=options.max_length,
    )


def summaries(documents: DocumentFile, summarize: Pipeline) -> Iterator[dict[str, str]]:
    """Name and summary of each document, as they come."""
    names = [document.name for document in documents]
    answers = summarize(document.content["text"] for document in documents)
    for name, answer in zip(names, answers, strict=True):
        yield {"id": name, "summary": answer["summary_text"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What is given, and defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; an untrained small BART by default")
    parser.add_argument("--convert", type=int, help="make a plain model read this many tokens")
    parser.add_argument("--input", help="folder of .txt, .txt or .jsonl; aclsum by default")
    parser.add_argument("--output", type=pathlib.Path, help="a .jsonl; shown only by default")
    parser.add_argument("--count", type=int, default=2, help="papers of aclsum")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a summary")
    parser.add_argument("--batch-size", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    """Shows, writes and returns the summaries."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        papers = pathlib.Path(folder) / "papers.jsonl"
        if not options.input:
            write_jsonl(papers, (paper.row for paper in read_papers("test", options.count)))
        documents = DocumentFile(options.input or papers)
        if not options.model:
            print("no --model: an untrained one, whose words are noise")
            texts = [document.content["text"] for document in documents]
            options.model = str(write_small_bart(pathlib.Path(folder) / "bart", texts))
        found = []
        for line in summaries(documents, summarizer(options.model, options)):
            print(f"{line['id']}: {line['summary']}\n")
            found.append(line)
    if options.output:
        write_jsonl(options.output, found)
    return found


if __name__ == "__main__":
    main()
