"""Predicts for a file of long documents over all devices, and resumes after a kill.

    python examples/batched_inference.py [documents.jsonl] [--checkpoint FOLDER] [--devices 8]

By default MiniLM, converted to LSG, reads 32 sources of Python's library. It has no classifier, so
a line has the pooler's vector. A checkpoint with labels answers as `lsg_flax.pipeline` does. Stop
and restart it: it resumes after the last finished window. Expected with --devices 2
--max-length 1024, on 2 busy CPU cores:

    predictions.jsonl: 32 documents, 32 of them now
    in 61 s, with compilation
"""

import argparse
import os
import pathlib
import tempfile
import time

from at_hand import minilm, sources, write_jsonl


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="?", help=".jsonl or .txt; Python's library by default")
    parser.add_argument("--output", default="predictions.jsonl")
    parser.add_argument("--checkpoint", help="with tokenizer; MiniLM by default")
    parser.add_argument("--max-length", type=int, default=4096, help="truncates longer documents")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=16, help="documents written together")
    parser.add_argument("--devices", type=int, help="simulated by the CPU; else real ones")
    parser.add_argument("--export", help="also write the program, as StableHLO, to this file")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace):
    """The model, its parameters and tokenizer; a checkpoint that reads too little is converted."""
    import lsg_flax
    from lsg_flax import hub

    folder = hub.resolve(options.checkpoint or minilm())
    model, params = lsg_flax.from_pretrained(folder)
    if model.max_length < options.max_length:
        model, params = lsg_flax.convert_checkpoint(folder, max_sequence_length=options.max_length)
    return model, params, hub.read_tokenizer(folder)


def main(arguments: list[str] | None = None):
    """Writes the files; returns what `predict_file` says it did."""
    options = parse(arguments)
    if options.devices:  # JAX reads it when it starts
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    from lsg_flax.buckets import default_buckets
    from lsg_flax.inference import export_model
    from lsg_flax.pipelines import ANSWERS, predict_file
    from lsg_flax.sharding import make_mesh

    model, params, tokenizer = load(options)
    mesh = make_mesh()  # the documents of a batch over all devices
    answers = ANSWERS.get(model.task)
    fields = ("pooler_output",) if model.task == "base" else None
    print(f"{model.task} on {dict(mesh.shape)}, at most {options.max_length} tokens")
    with tempfile.TemporaryDirectory() as folder:
        documents = options.documents
        if documents is None:
            rows = sources(at_least=10_000)[:32]
            documents = write_jsonl(pathlib.Path(folder) / "documents.jsonl", rows)
        start = time.perf_counter()
        written = predict_file(
            documents,
            options.output,
            model,
            params,
            tokenizer=tokenizer,
            answers=answers,
            fields=fields,
            truncation=True,
            batch_size=options.batch_size,
            buckets=default_buckets(options.max_length),
            mesh=mesh,
            window=options.window,
        )
    seconds = time.perf_counter() - start
    print(f"{options.output}: {written.documents} documents, {written.computed} of them now")
    print(f"in {seconds:.0f} s, with compilation")
    if options.export:
        fields = fields or ("logits",)
        length = options.max_length
        for file in export_model(model, params, options.export, length=length, fields=fields):
            print(
                f"{file}: {file.stat().st_size / 1e6:.0f} MB, runs with jax and flatbuffers alone"
            )
    return written


if __name__ == "__main__":
    main()
