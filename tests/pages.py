"""The fenced blocks of README.md, CONTRIBUTING.md and docs/: what a reader has before the first
block of each page, and which blocks another test runs, or none with a reason."""

import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import pyarrow
import pyarrow.parquet
from golden_data import GOLDEN
from tiny_run import save_tiny, write
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import hub, open_qa
from lsg_flax.models import FAMILIES, read_config
from lsg_flax.pipelines import Embedder

ROOT = pathlib.Path(__file__).parent.parent
Names = dict[str, Any]


class Block(NamedTuple):
    """The language of a block (empty for output), and what is in it."""

    language: str
    text: str


class Page(NamedTuple):
    """Makes the reader's files in the working directory; looks at what the blocks have made."""

    make_files: Callable[[], object] = lambda: None
    check: Callable[[Names], object] = lambda names: None


def pages() -> list[str]:
    """The pages, as paths from the root."""
    docs = (p for p in (ROOT / "docs").rglob("*.md") if "site" not in p.parts)
    return ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in docs)]


def blocks_of(page: str) -> list[Block]:
    """Its blocks of code and output, in order; lists of pages and of the API are none."""
    text = (ROOT / page).read_text()
    fences = re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)
    assert 2 * len(fences) == len(re.findall(r"```|~~~|\{code", text)), (
        f"{page}: a fence of its own"
    )
    return [Block(*fence) for fence in fences if fence[0] not in ("{eval-rst}", "{toctree}")]


def is_written(*names: str) -> None:
    """The files exist and are not empty."""
    assert all(pathlib.Path(name).stat().st_size for name in names)


# ---------------------------------------------------------------------------- the reader's files


def a_bert():
    """A plain BERT with a tokenizer."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")


def files_of_pytorch():
    """It, and texts with labels."""
    a_bert()
    for name in ("train.jsonl", "eval.jsonl"):
        write(pathlib.Path(), "single_label_classification", rows=8, name=name)


def files_of_summarization():
    """A plain BART, two papers, and pairs of articles and abstracts."""
    write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "path/to/bart"))
    papers = pathlib.Path("papers")
    papers.mkdir()
    for name in ("one.txt", "two.txt"):
        (papers / name).write_text("w5 w6 w7\nw8 " * 50)
    for name in ("train.jsonl", "eval.jsonl"):
        row = {"article": "w5 w6 w7 w8 " * 9, "abstract": "w5 w6 w7"}
        pathlib.Path(name).write_text(f"{json.dumps(row)}\n" * 8)


def files_of_inference():
    """A classifier, a BART, a decoder, and texts for each."""
    plain = GOLDEN / "bert_to_convert_512"
    model, params = lsg_flax.from_pretrained(plain, "sequence_classification")
    lsg_flax.save_pretrained("areas", model, params, hub.read_tokenizer(plain))
    bart = write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "bart"))
    lsg_flax.convert_checkpoint(bart, "lsg-bart-arxiv", max_sequence_length=512)
    writer, params = lsg_flax.from_pretrained(GOLDEN / "bert_causal_lm")
    lsg_flax.save_pretrained("writer", writer, params, hub.read_tokenizer(plain))
    for folder in ("data", "papers"):
        pathlib.Path(folder).mkdir()
    pathlib.Path("data/one.csv").write_text("body\nw5 w6\n")
    pathlib.Path("papers/one.txt").write_text("w5 w6 w7 w8 " * 9)
    pathlib.Path("prompts.jsonl").write_text('{"text": "w5 w6"}\n')


def check_inference(names: Names):
    is_written("answers.jsonl", "summaries.jsonl", "continuations.jsonl")
    same = [pathlib.Path(f"{name}.jsonl").read_bytes() for name in ("answers", "answers_in_python")]
    assert same[0] == same[1] and names["written"].documents == 1
    assert len(names["results"]) == 2 and names["ids"].shape == (4, 63)


def files_of_checkpoints():
    """A plain checkpoint, and a LocalTransformer."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/roberta")
    sizes = {"num_tokens": 31, "max_seq_len": 16, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4}
    sizes |= {"local_attn_window_size": 4}
    model = lsg_flax.Model(read_config({"model_type": "local-transformer", **sizes}), "causal_lm")
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    lsg_flax.save_pretrained("path/to/transformer", model, params)


def check_checkpoints(names: Names):
    is_written("roberta-4096/config.json")
    assert "global_layers" in names["params"]["encoder"]


def files_of_training():
    """A BERT that reads 4,096 tokens, and texts with labels, by two names each."""
    pathlib.Path("bert").mkdir()
    lsg_flax.convert_checkpoint(
        save_tiny(pathlib.Path("bert")), "bert-4096", max_sequence_length=4096, resize_lsg=True
    )
    texts = [" ".join([f"w{5 + i} w6 w7"] * (1 + i % 3)) for i in range(8)]
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    rows = [row | {"body": row["text"], "area": row["label"]} for row in rows]
    pathlib.Path("data").mkdir()
    for name in ("train", "eval", "documents", "data/part-1"):
        pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train", "eval", "documents"):
        lines = [f"{row['body']},{row['area']}\n" for row in rows]
        pathlib.Path(f"{name}.csv").write_text("body,area\n" + "".join(lines))


def check_training(names: Names):
    is_written("answers.jsonl", "answers-csv.jsonl", "areas-yaml/config.json")
    assert names["result"].step > 0
    merged, params = lsg_flax.from_pretrained("merged")
    paths = [flax.traverse_util.flatten_dict(t) for t in (params, merged.abstract_params())]
    assert paths[0].keys() == paths[1].keys()


def files_of_open_qa():
    """A REALM for questions, and the texts of its blocks."""
    source = shutil.copytree(GOLDEN / "realm_plain_open_qa", "realm")
    texts = open_qa.OpenQA.from_pretrained(source).records.texts(range(12))
    pathlib.Path("corpus.txt").write_text("".join(f"{text}\n" for text in texts))


def files_of_realm():
    """A reader."""
    shutil.copytree(GOLDEN / "realm_reader", "path/to/reader")


def check_realm(names: Names):
    assert 1 <= len(names["answer"]) <= 4


def files_of_index():
    """A plain BERT, texts with labels, and documents."""
    a_bert()
    rows = [f"{'w5 w6 ' * (1 + n)},{'ab'[n % 2]}\n" for n in range(8)]
    pathlib.Path("train.csv").write_text("text,label\n" + "".join(rows))
    pathlib.Path("documents.csv").write_text("text\nw5 w6 w7\n")


def check_index(names: Names):
    """The last command has answered."""
    is_written("answers.jsonl")


def files_of_families():
    """A DistilBERT."""
    shutil.copytree(GOLDEN / "distilbert_spread", "path/to/distilbert")


def check_rows(names: Names):
    """The rows of a new family, as docs/adding_a_family.md has them, are those of DistilBERT."""
    assert set(names["rows"]) <= set(FAMILIES["distilbert"].encoder)


def files_of_embeddings():
    """A dense sentence model, documents, pairs and texts."""
    source = GOLDEN / "bert_to_convert_512"
    Embedder.from_pretrained(source, pooling="mean").save_pretrained("path/to/all-MiniLM-L6-v2")
    rows = [{"text": f"w{5 + i} w6", "positive": f"w{5 + i} w9 " * 4} for i in range(16)]
    for name in ("pairs.jsonl", "held_out.jsonl", "texts.jsonl", "documents.jsonl"):
        pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pathlib.Path("data").mkdir()
    table = pyarrow.table({"body": [row["positive"] for row in rows], "key": [*range(16)]})
    pyarrow.parquet.write_table(table, "data/one.parquet")


# -------------------------------------------------------------------------- how each page is run

# A page whose blocks run one after the other, each with what those before it have made.
PAGES = {
    "README.md": Page(a_bert),
    "CONTRIBUTING.md": Page(),
    "docs/adding_a_family.md": Page(check=check_rows),
    "docs/api/index.md": Page(),
    "docs/checkpoints.md": Page(files_of_checkpoints, check_checkpoints),
    "docs/convert.md": Page(a_bert),
    "docs/design.md": Page(),
    "docs/embeddings.md": Page(files_of_embeddings),
    "docs/families.md": Page(files_of_families),
    "docs/from_pytorch.md": Page(files_of_pytorch),
    "docs/index.md": Page(files_of_index, check_index),
    "docs/inference.md": Page(files_of_inference, check_inference),
    "docs/install.md": Page(),
    "docs/kernels.md": Page(),
    "docs/long_models.md": Page(),
    "docs/open_qa.md": Page(files_of_open_qa),
    "docs/proven.md": Page(),
    "docs/realm.md": Page(files_of_realm, check_realm),
    "docs/speed.md": Page(),
    "docs/summarization.md": Page(files_of_summarization),
    "docs/training.md": Page(files_of_training, check_training),
    "docs/troubleshooting.md": Page(),
}

ON_PLANS = "tests/test_readme.py::test_a_real_tpu_compilation_by_each_command_of_the_page_on_plans"
ON_PYTORCH = "tests/parity/test_parity_pages.py::test_both_sides_of_the_page_agree"
OF_PYTORCH = "tests/parity/test_parity_pages.py::test_the_pytorch_of_other_pages_runs"
COMMANDS = "tests/test_cli_train.py::test_an_example_says_what_stands_in_the_docs"
EXPORTS = "tests/test_export.py::test_the_documented_lines_run_it_without_lsg_flax"
WRITES = "tests/test_export.py::test_the_documented_lines_write_texts_without_lsg_flax"

# Words of a block -> the test that runs it instead, as it stands or with smaller sizes.
ELSEWHERE = {
    "docs/adding_a_family.md": {"from transformers import DistilBertConfig": OF_PYTORCH},
    "docs/checkpoints.md": {"from lsg_converter": OF_PYTORCH},
    "docs/commands.md": {"": "tests/test_readme.py::test_each_command_says_what_its_example_shows"},
    "docs/from_pytorch.md": {
        "LSGConverter(": ON_PYTORCH,
        "with torch.no_grad()": ON_PYTORCH,
    },
    "docs/inference.md": {
        "export_model(": EXPORTS,
        'open("classifier.stablehlo"': EXPORTS,
        "export_texts(": WRITES,
        'open(f"summarizer/{name}': WRITES,
    },
    "docs/other_models.md": {
        "": "tests/test_other_models.py::test_document_runs_from_top_to_bottom"
    },
    "docs/plan.md": {
        "--topology v5e": ON_PLANS,
        "--topology h100": "tests/test_readme.py::test_the_command_for_gpus_of_the_page_on_plans",
    },
    "docs/scaling.md": {
        "training.fit(": "tests/test_examples_scale.py::test_the_program_of_the_scaling_page",
        "distributed.initialize": "tests/test_multiprocess.py::"
        "test_the_documented_lines_join_hosts",
    },
    "docs/training.md": {
        "lsg-flax data": COMMANDS,
        "lsg-flax evaluate ./areas": COMMANDS,
        "lsg-flax evaluate ./asked": "tests/test_answers.py::"
        "test_the_documented_command_says_what_stands_there",
        "segment_ids=segment_ids": "tests/test_packing.py::test_the_documented_program_runs",
        "predict_with_generate: true": "tests/test_finetune.py::"
        "test_the_documented_run_makes_a_plain_model_write_about_long_texts",
    },
}

# Words of a block -> why no test runs it.
NOWHERE = {
    "docs/from_pytorch.md": {
        "TrainingArguments(": "run once, with accelerate 0.27.2 and datasets 2.16.1, which the "
        "reference environment lacks; tests/parity/test_parity_pages.py checks the names",
        "torchax.extract_jax": "run once; make torchax makes the same calls",
    },
}

# Pages without any block, and why.
WITHOUT = {
    "docs/tasks.md": "a table of links",
    **{
        f"docs/api/{path.name}": "made of the docstrings"
        for path in (ROOT / "docs/api").glob("*.md")
        if path.stem != "index"
    },
}

# Programs of sh lines that no test may start.
INSTALLS = ("pip", "git")
# Targets of make that CI (.ci/run) does not run -> what runs what they do.
TARGETS = {
    "demo": "tests/test_demo.py::test_readers_learn_are_compared_and_drawn",
    "bench": "tests/parity/test_parity_pages.py::test_the_benchmark_of_the_page_on_speed",
    "tpu-report": "tests/test_benchmarks.py::test_a_real_tpu_compilation_makes_a_row_of_the_report",
    "families": "make parity measures the same",
    "check": "a part of make test",
    "format": "make test checks the same",
}
