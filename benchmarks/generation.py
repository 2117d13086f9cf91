"""Times `generate` of lsg_flax beside that of the PyTorch reference on this machine: an LSG-BART of
base size, 4,096 tokens in, 64 out, 4 beams; same weights, same tokens, in turn, in one run.

    make bench     # or: python benchmarks/generation.py --reference-python PATH

Both processes stay alive side by side. The machine may be shared, so only the ratio is meaningful;
each pair of turns gives one. Memory is a process's peak resident size after warm-up. lsg_flax's
program comes from JAX's persistent compilation cache, which an earlier process has filled; that
process's memory, with what compiling left there, is printed too. Writes docs/generation.json.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile

from workers import ask, make_parser, serve, start, turn

MODEL = {
    "model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6,
    "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "max_position_embeddings": 4096,
    "base_model_prefix": "lsg", "block_size": 128, "sparse_block_size": 128, "sparsity_factor": 2,
    "sparsity_type": "norm", "is_encoder_decoder": True, "decoder_start_token_id": 2,
}  # fmt: skip
TOKENS = 4096
SEARCH = {"num_beams": 4, "max_new_tokens": 64, "min_new_tokens": 64, "no_repeat_ngram_size": 3}
RIVALS = ("reference", "lsg_flax")


def document(np):
    """The ids that both get."""
    return np.random.default_rng(0).integers(5, MODEL["vocab_size"], (1, TOKENS))


def flax_step(folder: str):
    """A function that gives the tokens of lsg_flax."""
    import numpy as np

    import lsg_flax

    model, params = lsg_flax.from_pretrained(folder)
    ids = document(np)
    return lambda: lsg_flax.generate(model, params, ids, np.ones_like(ids), **SEARCH).tolist()


def torch_step(folder: str):
    """The same with the reference."""
    import numpy as np
    import torch
    from lsg_converter.bart.modeling_lsg_bart import LSGBartForConditionalGeneration

    torch.set_num_threads(os.cpu_count() or 1)
    model = LSGBartForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor(document(np))

    def step():
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **SEARCH).tolist()

    return step


def make_checkpoint(folder: str) -> None:
    """Random weights that both sides load, large enough that no choice of a token is close."""
    import jax

    import lsg_flax
    from lsg_flax.models import Model, read_config

    model = Model(read_config(MODEL), "conditional_generation")
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    lsg_flax.save_pretrained(folder, model, jax.tree.map(lambda x: 2 * x, params))


def measure(pythons: dict[str, str], folder: str, repeats: int) -> dict[str, list[dict]]:
    """What each turn of both takes."""
    compiling = start(pythons["lsg_flax"], __file__, "lsg_flax", folder)
    ask(compiling)
    compiled = turn(compiling)
    compiling.kill()
    workers = {name: start(python, __file__, name, folder) for name, python in pythons.items()}
    try:
        tokens = {name: ask(worker)["tokens"] for name, worker in workers.items()}
        if tokens["reference"] != tokens["lsg_flax"]:
            raise AssertionError(f"the rivals write different tokens: {tokens}")
        turns = [{name: turn(worker) for name, worker in workers.items()} for _ in range(repeats)]
    finally:
        for worker in workers.values():
            worker.kill()
    return {name: [each[name] for each in turns] for name in RIVALS} | {"compiled": [compiled]}


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians and ratios; those of seconds are of neighbouring turns."""
    found: dict = {}
    for name, turns in runs.items():
        found[name] = {key: statistics.median(t[key] for t in turns) for key in ("seconds", "cpu")}
        found[name]["mib"] = max(t["mib"] for t in turns)
    pairs = list(zip(runs["lsg_flax"], runs["reference"], strict=True))
    found["ratio"] = {
        key: statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
        for key in ("seconds", "cpu")
    }
    found["ratio"]["mib"] = found["lsg_flax"]["mib"] / found["reference"]["mib"]
    return found


def main() -> None:
    """Runs the comparison."""
    parser = make_parser(__doc__, 5, 2)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs"))
    options = parser.parse_args()
    if options.worker:
        rival, folder = options.worker
        step = torch_step(folder) if rival == "reference" else flax_step(folder)
        serve(step, {"tokens": step()})
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        make_checkpoint(folder)
        pythons = {"reference": options.reference_python, "lsg_flax": sys.executable}
        found = summary(measure(pythons, folder, options.repeats))
    print(f"{'':10}{'s':>8}{'CPU s':>8}{'MiB':>8}")
    for name in (*RIVALS, "ratio"):
        row = found[name]
        digits = 2 if name == "ratio" else 0
        print(f"{name:10}{row['seconds']:8.2f}{row['cpu']:8.2f}{row['mib']:8.{digits}f}")
    print(f"peak where the program was compiled: {found['compiled']['mib']:.0f} MiB")
    (options.output / "generation.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
