"""Makes docs/kernels.md's tables and picture of what TPU compilers make of LSG attention.

    make tpu-report      # or, in pieces: PYTHONPATH=.libtpu python benchmarks/tpu_report.py \\
                         #     --chips v5e --what pallas splash --passes both --lengths 1024 4096

Attention of 4 rows of 4,096 tokens and a global, 12 heads of 64, bfloat16, blocks of 128, `norm`,
forward and with all gradients:

xla      `lsg_attention` by its definition
pallas   by the fused kernels
layer    the kernels as a model's layer calls them: arrays [rows, tokens + globals, heads * width],
         as projections write them, with the global behind the tokens and a full last tile
splash   JAX's splash attention with the same pattern as one mask over tokens, representatives and
         a global; it selects none, and has no rows for the global
torchax  the PyTorch reference's `LSGSelfAttention`, run by torchax (`make torchax`)
step     a training step of RoBERTa-base, with 4 rows a chip on four chips, as `lsg-flax plan`
step0    the same without dropout of attention

No TPU is needed. Each is compiled in a process of its own, some for minutes. Each row is saved in
OUTPUT/tpu_report.json when it is done, in place of an earlier one, and the tables have all saved
rows. GB are those to and from main memory, temporaries what is allocated there (for a step, what is
needed at its peak). Cycles of XLA are its own estimate, in which sorts, gathers, scatters and
kernels count 0. Those of kernels, for 4,096 tokens, are the bundles of their loops in the
compiler's final schedule times their rounds; for splash attention that is an upper bound.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
from typing import Any
from unittest import mock

import kernels
from kernels import BLOCK, HEADS, OPERATIONS, ROWS, TOKENS, WIDTH, compile_passes
from plots import Panel, save_picture
from tpu_programs import TOPOLOGIES, facts_of, loop_bundles, measure_apart, schedules

TILE, FACTOR, LAYERS = 512, 2, 12
STEPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CONFIG = pathlib.Path(__file__).parent / "configs" / "roberta-base.json"
LABELS = {
    "xla": "XLA",
    "pallas": "fused kernels",
    "layer": "fused kernels within a layer",
    "splash": "splash attention, same mask",
    "torchax": "PyTorch's LSG by torchax",
    "step": "training step",
    "step0": "training step, no dropout of attention",
}
PICTURED = ("xla", "pallas", "layer", "splash")
LENGTHS = [1024, 2048, 4096, 8192, 16384]
Row = dict[str, Any]


@functools.cache  # as one that is unlike others takes its own tiles for each head
def lsg_tiles(tokens: int):
    """What each of the tokens sees of tokens, representatives and a global one, whole tiles of
    keys: its block and its neighbours, and the representatives of the next block but one on either
    side. A lazy array for splash attention, [T, keys]."""
    import numpy as np
    from jax.experimental.pallas.ops.tpu import splash_attention

    class Mask(splash_attention.Mask):
        keys = -(-(tokens + tokens // FACTOR + 1) // TILE) * TILE
        shape = property(lambda self: (tokens, self.keys))

        def __getitem__(self, index):
            query, key = (np.arange(n)[i] for n, i in zip(self.shape, index, strict=True))
            own, of_rest = query[:, None] // BLOCK, key - tokens
            away = np.abs(own - key // BLOCK)
            chosen = np.abs(own - of_rest * FACTOR // BLOCK)
            ends = tokens // FACTOR
            near = (key < tokens) & (away <= 1)
            sparse = (of_rest >= 0) & (of_rest < ends) & (chosen > 1) & (chosen <= 1 + FACTOR)
            return near | sparse | (of_rest == ends)

    return Mask()


def splash(tokens: int):
    """Splash attention of all rows, and the shapes of what it is given."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import splash_attention

    # The backward kernels of q apart, as in the fused one gradients of q are summed in main memory.
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash_attention.BlockSizes(**{f"block_{name}": TILE for name in names})
    mask = lsg_tiles(tokens)
    heads = splash_attention.MultiHeadMask([mask] * HEADS)
    kernel = splash_attention.make_splash_mha_single_device(mask=heads, block_sizes=sizes)

    def attend(_, *arrays):
        return jax.vmap(kernel)(*arrays)

    lengths = (tokens, mask.keys, mask.keys)
    shapes = [(ROWS, HEADS, length, WIDTH) for length in lengths]
    return attend, None, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def visited(tokens: int) -> int:
    """Tiles of queries and keys of one head in which somebody sees something."""
    mask = lsg_tiles(tokens)
    tiles = [[slice(i, i + TILE) for i in range(0, n, TILE)] for n in mask.shape]
    return sum(bool(mask[query, key].any()) for query in tiles[0] for key in tiles[1])


def torchax_attention(tokens: int):
    """The reference's attention behind its projections, and the shapes of what it is given."""
    import jax
    import jax.numpy as jnp
    import torch
    import torchax
    from lsg_converter.bert.modeling_lsg_bert import LSGBertConfig, LSGSelfAttention

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS}
            self.layer = LSGSelfAttention(LSGBertConfig(**sizes))

        def forward(self, mask, query, key, value):
            return self.layer.not_causal_forward(query, key, value, attention_mask=mask)[0]

    states, run = torchax.extract_jax(Attention().eval())

    def attend(*arrays):
        context = run(states, arrays)  # [B, T, heads * width]
        return context.reshape(ROWS, -1, HEADS, WIDTH).swapaxes(1, 2)

    array = jax.ShapeDtypeStruct((ROWS, HEADS, 1 + tokens, WIDTH), jnp.bfloat16)
    return attend, jax.ShapeDtypeStruct((ROWS, 1, 1, tokens), jnp.bfloat16), [array] * 3


def compile_one(chip: str, what: str, passes: str, tokens: str) -> dict[str, float]:
    """Compiles in this process, which was started for it."""
    attend, mask, shapes = (splash if what == "splash" else torchax_attention)(int(tokens))
    return compile_passes(chip, passes, attend, mask, shapes)


def measure_step(chip: str, what: str, tokens: int) -> dict[str, float]:
    """The whole step, by its plan."""
    from lsg_flax.planning import PlanSettings, plan

    config = json.loads(CONFIG.read_text())
    config |= {"attention_probs_dropout_prob": 0.0} if what == "step0" else {}
    with tempfile.TemporaryDirectory() as home, schedules() as (settings, folder):
        source = pathlib.Path(home) / "config.json"
        source.write_text(json.dumps(config))
        with mock.patch.dict(os.environ, settings):
            found = plan(
                PlanSettings(
                    source=str(source),
                    topology=STEPS[chip],
                    task="sequence_classification",
                    max_length=tokens,
                    batch_size=4 * ROWS,
                )
            )
        if found.program is None:
            raise RuntimeError(f"the step does not fit {chip}: {found.refusal}")
        facts = facts_of(found.program, found.memory.temporaries, found.compile_seconds)
        cycles = kernels.kernel_cycles(folder, tokens)
        facts |= {kernel: LAYERS * each for kernel, each in cycles.items()}
    return facts


def measure(chip: str, what: str, passes: str, tokens: int, torchax_python: str) -> Row:
    """One row."""
    case = {"chip": chip, "what": what, "passes": passes, "tokens": tokens}
    if what in ("xla", "pallas", "layer"):
        return kernels.measure(chip, what, passes, tokens)
    if what in ("step", "step0"):
        return case | measure_step(chip, what, tokens)
    given = (chip, what, passes, tokens)
    if what == "torchax":
        return case | measure_apart(__file__, *given, python=torchax_python)
    with schedules() as (settings, folder):
        found = measure_apart(__file__, *given, python=sys.executable, settings=settings)
        times = ROWS * HEADS * visited(tokens)
        for kernel, names in {"forward": ["fwd"], "backward": ["dq", "dkv"]}.items():
            loops = [loop_bundles(folder, f"splash_mha_{name}", 1) for name in names]
            if any(loops):
                found[kernel] = times * sum(sum(map(sum, each)) for each in loops)
    return case | found


def table(rows: list[Row]) -> str:
    """Markdown, of the rows in the order of chips and cases."""
    columns = ["chip", "what", "moved, GB", "temporaries, MB", "XLA's cycles, M"]
    columns += ["kernels' cycles, M", "sorts, gathers, scatters", "compile time"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        passes = {"forward": ", forward", "both": ", forward and backward"}.get(row["passes"], "")
        cycles = [f"{row[k] / 1e6:,.2f}" for k in ("forward", "backward") if row.get(k)]
        cells = [row["chip"], LABELS[row["what"]] + passes, f"{row['gigabytes']:,.3f}"]
        cells += [f"{row['temporaries']:,.0f}", f"{row['xla_cycles'] / 1e6:,.1f}"]
        cells += [" + ".join(cycles) or "none", ", ".join(f"{row[name]:,}" for name in OPERATIONS)]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} s |")
    return "\n".join(lines)


def draw(rows: list[Row], file: pathlib.Path) -> None:
    """Bytes and temporaries over length, of forward and backward on v5e."""
    drawn = [row for row in rows if (row["chip"], row["passes"]) == ("v5e", "both")]

    def curves(key: str, least: float = 0.0):
        points = {what: [row for row in drawn if row["what"] == what] for what in PICTURED}
        return {
            what: [(row["tokens"], max(row[key], least)) for row in of_one]
            for what, of_one in points.items()
        }

    panels = [
        Panel("to and from main memory", "GB", curves("gigabytes")),
        Panel("temporaries in main memory", "MB, at least 1", curves("temporaries", 1.0)),
    ]
    title = f"LSG attention with its gradients, {ROWS} rows, {HEADS} heads of {WIDTH}, v5e"
    save_picture(file, title, panels, {what: LABELS[what] for what in PICTURED})


def cases(options: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """The rows that are asked for; without lengths the tables', and the picture's behind them."""
    found = []
    for chip in options.chips:
        for length in options.lengths or [TOKENS]:
            for what in options.what:
                passes = ["step"] if what.startswith("step") else options.passes
                found += [(chip, what, each, length) for each in passes]
    if options.lengths is None and "v5e" in options.chips and "both" in options.passes:
        drawn = [what for what in options.what if what in PICTURED]
        found += [("v5e", what, "both", n) for n in LENGTHS if n != TOKENS for what in drawn]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, keeps what is found, prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--what", nargs="*", choices=LABELS, default=[*LABELS], help="or none")
    parser.add_argument("--passes", nargs="+", choices=["forward", "both"])
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens; 4,096 and the picture's by default"
    )
    parser.add_argument("--torchax-python", default=".venv-torchax/bin/python")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(compile_one(*options.one)))
        return
    options.passes = options.passes or ["forward", "both"]
    kept = options.output / "tpu_report.json"
    for case in cases(options):
        print(f"{', '.join(map(str, case))} ...", flush=True)
        keep(measure(*case, torchax_python=options.torchax_python), kept)
    rows = read(kept)
    print(table([row for row in rows if row["tokens"] in (options.lengths or [TOKENS])]))
    draw(rows, options.output / "tpu_report.png")


def read(kept: pathlib.Path) -> list[Row]:
    """The rows that were found so far."""
    return json.loads(kept.read_text()) if kept.exists() else []


def keep(row: Row, kept: pathlib.Path) -> None:
    """Puts a row among those of the file, which another process may have written meanwhile."""
    rows = [old for old in read(kept) if identity(old) != identity(row)] + [row]
    rows.sort(key=identity)
    kept.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def identity(row: Row) -> tuple[int, int, int, str]:
    """What a row is of, in the order of the tables."""
    places = (list(TOPOLOGIES).index(row["chip"]), row["tokens"], list(LABELS).index(row["what"]))
    return *places, row["passes"]


if __name__ == "__main__":
    main()
