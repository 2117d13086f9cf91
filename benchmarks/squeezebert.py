"""Times SqueezeBERT's forward pass beside PyTorch's: same weights and tokens, in turn, on this CPU.

    python benchmarks/squeezebert.py --reference-python .venv-reference/bin/python

The model is of base size (12 layers, 768 wide, groups 4/4/4/1/4/4 as squeezebert-uncased). Both
processes stay alive and run alternately, so that a slow moment of the machine hits both. CPU
seconds are those of the process, over all its threads; other programs do not lengthen them.
"""

import os
import sys
import tempfile

from vs_reference import make_checkpoint
from workers import compare, make_parser, serve

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
    serve(step, {"value": step()})


def main() -> None:
    """Runs the comparison and prints medians, and those of the ratios of neighbouring runs."""
    parser = make_parser(__doc__, 9, 4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    if options.worker:
        rival, folder, batch, length = options.worker
        work(rival, folder, int(batch), int(length))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, max(options.length, 512), MODEL)
        pythons = {"PyTorch": options.reference_python, "lsg_flax": sys.executable}
        sizes = folder, options.batch_size, options.length
        result = compare(__file__, pythons, sizes, options.repeats)
    sizes = f"{options.batch_size} x {options.length} tokens"
    print(f"SqueezeBERT, base size, {sizes}, {options.repeats} runs in turn")
    print(result)


if __name__ == "__main__":
    main()
