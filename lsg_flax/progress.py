"""What a run tells of itself: a bar, metrics as JSON lines and for TensorBoard, how often a
function was compiled, and how much of the chip's peak is used.

Axes: M microbatches, B batch, T tokens.
"""

import functools
import json
import math
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.monitoring
import numpy as np
from tqdm import tqdm

from lsg_flax.chips import CHIPS
from lsg_flax.config import EncoderConfig
from lsg_flax.losses import Batch, Metrics
from lsg_flax.models.model import Model

# Peak dense bfloat16 FLOP/s of one chip by what `device_kind` contains; NVIDIA's from its data
# sheets (SXM). A device of JAX is one chip (two cores of v4 and v5p together).
PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds} | {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
METRICS_FILE = "metrics.jsonl"
_ONCE_PER_TEXT = ("sequence_classification", "multiple_choice", "next_sentence_prediction")


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by JAX's name for it; None for one that is not known."""
    matching = [name for name in PEAK_FLOPS if name.lower() in device_kind.lower()]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def train_flops(model: Model, batch: Batch) -> float:
    """Model FLOPs of a training step on a batch: what the mathematics asks for on real tokens.

    Per real token 6 P + 12 L D S: two FLOPs for each of the P parameters in matrix products (the
    encoder's kernels, as often as they are used, and those of heads that answer per token, the
    vocabulary's included) and 4 D for each of S keys seen (scores and values, L layers, width D),
    three times for forward and backward. S is T with full attention; with LSG attention
    the globals, three local blocks and two sparse ones, and g more for the g rows that see all;
    never more than T. Padding, recomputation (remat), dropout and gradients that
    freezing spares are left out, so the utilisation computed from it compares like with like.

    Args:
        batch: [B, T] or [M, B, T] by Hugging Face's names.
    """
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    mask = batch.get("attention_mask")
    tokens = math.prod(ids.shape) if mask is None else int(np.count_nonzero(np.asarray(mask)))
    config, length = model.config, ids.shape[-1]
    attention = 12 * config.num_hidden_layers * config.hidden_size * _keys_seen(config, length)
    return float(tokens) * (6 * _matmul_parameters(model) + attention)


def _keys_seen(config: EncoderConfig, length: int) -> int:
    lsg = config.lsg
    if lsg is None:
        return length
    sparse = 0 if lsg.sparsity_type in (None, "none") else 2 * lsg.sparse_block_size
    return min(length, 2 * lsg.num_global_tokens + 3 * lsg.block_size + sparse)


def _count_matmul_parameters(model: Model) -> int:
    """Parameters that each token is multiplied with."""
    shape = (1, 1, 3) if model.task == "multiple_choice" else (1, 3)
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.int32))
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(tree["params"], sep="/")
    config = model.config
    uses = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
    parts = ("encoder/",) if model.task in _ONCE_PER_TEXT else ("encoder/", "head/")
    kernels = [p for p in leaves if p.endswith("/kernel") and p.startswith(parts)]
    count = sum(leaves[p].size * (uses if "/layers/" in p else 1) for p in kernels)
    head = {path: leaf.shape for path, leaf in leaves.items() if path.startswith("head/")}
    own = any(config.vocab_size in shape for shape in head.values() if len(shape) == 2)
    if (config.vocab_size,) in head.values() and not own:  # a bias over words: the tied table
        count += leaves["encoder/embeddings/word_embeddings/embedding"].size
    return count


_matmul_parameters: Any = functools.lru_cache(maxsize=8)(_count_matmul_parameters)


class CompilationCounter:
    """Counts how often XLA compiles a jitted function, inside a `with`. A program that comes from
    JAX's persistent cache instead counts as well.

    Attributes:
        count: compilations so far.
    """

    def __init__(self, function: Callable):
        self.count = 0
        self._names = {f"jit({function.__name__})", function.__name__}

    def _listen(self, event: str, duration_secs: float, **details: Any) -> None:
        if event.endswith("/backend_compile_duration") and details.get("fun_name") in self._names:
            self.count += 1

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


class RunLog:
    """The bar, and the files in a folder, inside a `with`; only process 0 shows and writes."""

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        *,
        first: int = 0,
        steps: int,
        tensorboard: bool = False,
        progress: bool = True,
    ):
        """Opens the files.

        Args:
            folder: gets metrics.jsonl, one line per step; None writes nothing.
            first: the step that the run starts behind; what the files hold of later ones, from a
                run that was killed before it saved them, is dropped.
            steps: where the run ends.
            tensorboard: write event files too, with the package tensorboardX.
            progress: show the bar.

        Raises:
            ValueError: for tensorboard without a folder.
            ImportError: if tensorboardX is not installed.
        """
        if tensorboard and folder is None:
            raise ValueError("tensorboard=True needs a folder to write to: give log=FOLDER too.")
        speaks = jax.process_index() == 0
        self._lines = self._board = None
        if folder is not None and speaks:
            file = pathlib.Path(folder) / METRICS_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(file, first)
            self._lines = file.open("a", buffering=1)  # each line goes out when it is whole
        if tensorboard and speaks:
            self._board = _summary_writer(folder, first)
        bar_shown = progress and speaks
        self._bar = tqdm(total=steps, initial=first, unit="step", disable=not bar_shown)

    def write(self, record: Metrics) -> None:
        """Tells of a step: `step`, `loss`, and whatever else the record has."""
        if self._lines is not None:
            self._lines.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])
        self._bar.set_postfix_str(_summary(record), refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        for file in (self._lines, self._board):
            if file is not None:
                file.close()


def _summary(record: Metrics) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if "compilations" in record:
        parts.append(f"compiled {record['compilations']}x")
    return ", ".join(parts)


def _drop_after(file: pathlib.Path, last: int) -> None:
    """Keeps the lines of steps up to `last`; a line cut off by a kill goes too."""
    if not file.exists():
        return
    text = file.read_text()
    whole, kept = text.splitlines(keepends=True), []
    for number, line in enumerate(whole, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(whole):
                break
            raise ValueError(
                f"line {number} of {file} is no record of a step: {line[:80]!r}; mend or move the "
                "file, or log to another folder."
            ) from error
        if step <= last and line.endswith("\n"):
            kept.append(line)
    if "".join(kept) != text:
        aside = file.with_name(f".{file.name}.new")
        aside.write_text("".join(kept))
        os.replace(aside, file)


def _summary_writer(folder: Any, first: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs the package tensorboardX: pip install 'lsg-flax[tensorboard]'."
        ) from error
    # Files are named by the second: a run that goes on at once must not replace its own file.
    return SummaryWriter(str(folder), purge_step=first + 1, filename_suffix=f".{uuid.uuid4().hex}")
