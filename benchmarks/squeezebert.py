"""SqueezeBERT's forward pass beside PyTorch's: same weights, same tokens, in turn, on this CPU.

    python benchmarks/squeezebert.py --reference-python .venv-reference/bin/python

The model is of base size (12 layers, 768 wide, groups 4/4/4/1/4/4 as squeezebert-uncased). Both
processes stay alive and run alternately, so that a slow moment of the machine hits both. CPU
seconds are those of the process, over all its threads: they are not stretched by other programs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from vs_reference import ask, make_checkpoint

MODEL = {"model_type": "squeezebert", "vocab_size": 8192}


def jax_step(folder: str, ids):
    """A function that runs lsg_flax once and returns a number to compare."""
    import jax
    import numpy as np

    import lsg_flax

    model, params = lsg_flax.from_pretrained(folder)
    mask = np.ones_like(ids)

    @jax.jit
    def forward(params):
        return model.apply({"params": params}, ids, mask).last_hidden_state

    return lambda: float(abs(np.asarray(forward(params))).mean())


def torch_step(folder: str, ids):
    """The same with PyTorch."""
    import torch
    from transformers import SqueezeBertModel

    torch.set_num_threads(os.cpu_count() or 1)
    model = SqueezeBertModel.from_pretrained(folder).eval()
    given = torch.tensor(ids), torch.ones(ids.shape, dtype=torch.long)

    def forward():
        with torch.no_grad():
            return float(model(*given).last_hidden_state.abs().mean())

    return forward


def work(rival: str, folder: str, batch: int, length: int) -> None:
    """A rival's process: warms up, then runs once for each line on standard input."""
    import numpy as np

    ids = np.random.default_rng(0).integers(5, MODEL["vocab_size"], (batch, length))
    step = (torch_step if rival == "PyTorch" else jax_step)(folder, ids)
    step()
    print(json.dumps({"value": step()}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(spent), flush=True)


def start(python: str, *arguments: object) -> subprocess.Popen:
    """A worker process."""
    command = [python, "-W", "ignore", __file__, "--worker", *map(str, arguments)]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def compare(pythons: dict[str, str], folder: str, options: argparse.Namespace) -> dict[str, list]:
    """What each run of each rival took."""
    sizes = folder, options.batch_size, options.length
    processes = {rival: start(python, rival, *sizes) for rival, python in pythons.items()}
    runs: dict[str, list] = {rival: [] for rival in processes}
    try:
        values = {rival: ask(process)["value"] for rival, process in processes.items()}
        if abs(values["PyTorch"] / values["lsg_flax"] - 1) > 1e-4:
            raise AssertionError(f"the rivals compute different things: {values}")
        for _ in range(options.repeats):
            for rival, process in processes.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                runs[rival].append(ask(process))
    finally:
        for process in processes.values():
            process.kill()
    return runs


def main() -> None:
    """Runs the comparison and prints medians, and those of the ratios of neighbouring runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", default=".venv-reference/bin/python")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rival, folder, batch, length = options.worker
        work(rival, folder, int(batch), int(length))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, max(options.length, 512), MODEL)
        pythons = {"PyTorch": options.reference_python, "lsg_flax": sys.executable}
        runs = compare(pythons, folder, options)
    sizes = f"{options.batch_size} x {options.length} tokens"
    print(f"SqueezeBERT, base size, {sizes}, medians of {options.repeats} runs in turn")
    for what, said in (("seconds", "seconds"), ("cpu", "CPU seconds")):
        theirs, ours = ([run[what] for run in runs[rival]] for rival in ("PyTorch", "lsg_flax"))
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        medians = statistics.median(theirs), statistics.median(ours)
        print(f"{said:>12}: PyTorch {medians[0]:.2f}, lsg_flax {medians[1]:.2f}, {ratio:.2f} x")


if __name__ == "__main__":
    main()
