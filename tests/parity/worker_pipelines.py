"""Random BERTs with trained tokenizers, and what transformers' own pipelines make of texts:
`python worker_pipelines.py JOB_DIR`. Runs in the reference environment.

job.json  texts (to train the tokenizers on), checkpoints {name: {class, config, tokenizer}},
          calls [{checkpoint, task, inputs, options}]; for question answering inputs are keywords
answers.json  the pipelines' answers, in the order of the calls; beside it the checkpoints
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))

import torch
import transformers
import worker
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer


def wordpiece(texts, folder, length):
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts, vocab_size=300, show_progress=False)
    trained.save_model(str(folder))
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=length)


def byte_level(texts, folder, length):
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(texts, 400, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    return transformers.RobertaTokenizerFast(*files, model_max_length=length)


TOKENIZERS = {"wordpiece": wordpiece, "byte_level": byte_level}


def make(folder, case, texts):
    folder.mkdir()
    length = case["config"]["max_position_embeddings"]
    tokenizer = TOKENIZERS[case["tokenizer"]](texts, folder, length)
    tokenizer.save_pretrained(folder)
    config = case["config"] | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    cls = worker.model_class(case["class"], "bert")
    model = cls(cls.config_class(**config))
    worker.randomise(model, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # it would give every token the same label
            torch.nn.init.zeros_(parameter)
    worker.save_model(model, folder)


def main(folder):
    job = json.loads((folder / "job.json").read_text())
    torch.manual_seed(0)
    for name, case in job["checkpoints"].items():
        make(folder / name, case, job["texts"])
    answers, pipes = [], {}
    for call in job["calls"]:
        key = call["task"], call["checkpoint"]
        if key not in pipes:
            pipes[key] = transformers.pipeline(key[0], model=str(folder / key[1]))
        inputs = call["inputs"]
        keywords = inputs if call["task"] == "question-answering" else {}
        positional = () if keywords else (inputs,)
        answers.append(pipes[key](*positional, **keywords, **call["options"]))
    (folder / "answers.json").write_text(json.dumps(answers, default=float))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
