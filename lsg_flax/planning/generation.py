"""The program of generation for a plan, and the bytes that each of its steps must read.

Axes: L layers, B batch, N heads, H head width, S keys.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsg_flax.generation import GenerateCall, ModelDecoder, Prompt, Ready, begin, decode, prepare
from lsg_flax.models import Model, Params
from lsg_flax.planning.settings import PlanSettings, StepReads
from lsg_flax.sharding import batch_shardings

_LOOKED_UP = r"(position|token_type)_embeddings/"
_OF_STATES = r"cross_attention/(key|value)/"  # used once: the cache stores their results


def generate_call(model: Model, settings: PlanSettings) -> Ready:
    """Returns the inputs of the generation loop, for documents without padding.

    Raises:
        ValueError: if the prompt has no room, and as `generate`.
    """
    rows, length, new = settings.batch_size, settings.max_length, settings.max_new_tokens
    assert length is not None and new is not None
    if not model.has_two_stacks:
        length -= new
        if length < 1:
            raise ValueError(
                f"max_new_tokens={new} leaves no room for a prompt in max_length="
                f"{settings.max_length}, the tokens of prompt and continuation together: give "
                "fewer new tokens, or a larger max_length."
            )
    ids = np.zeros((rows, length), np.int32)
    call: GenerateCall = {"max_new_tokens": new, "key": jax.random.key(0)}
    if settings.num_beams is not None:
        call["num_beams"] = settings.num_beams
    return prepare(model, ids, np.ones(ids.shape, bool), call)


def generate_arguments(ready: Ready, mesh: Mesh) -> tuple[Prompt, Any, Any]:
    """Returns the prompt, text and key of the loop as abstract arrays, sharded over the mesh as
    `generate` does."""
    whole = NamedSharding(mesh, PartitionSpec())

    def shaped(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    cut = batch_shardings(ready.prompt, mesh)
    prompt = {name: shaped(array, cut[name]) for name, array in ready.prompt.items()}
    text = ready.text._asdict()
    rows = {name: text[name] for name in ("tokens", "first") if text[name] is not None}
    cut = dict.fromkeys(text, whole) | batch_shardings(rows, mesh)
    shapes = {name: x if x is None else shaped(x, cut[name]) for name, x in text.items()}
    if ready.text.source is not None:
        shapes["source"] = prompt["input_ids"]
    return prompt, ready.text._replace(**shapes), shaped(jax.random.key(0), whole)


def jitted_generate(ready: Ready) -> jax.stages.Wrapped:
    """Returns the jitted loop, a function of a decoder and `generate_arguments`."""
    return jax.jit(lambda *arguments: decode(*arguments, how=ready.how))


def step_reads(model: Model, params: Params, ready: Ready, mesh: Mesh) -> StepReads:
    """Returns the bytes that one chip must read per step; `params` are abstract arrays with
    shardings."""
    inputs = (ready.prompt, ready.text, jax.random.key(0))
    state = jax.eval_shape(
        lambda params: begin(ModelDecoder(params, model), *inputs, how=ready.how).state, params
    )
    memory, own = state.layers.memory, state.layers._replace(memory=None)
    unread = [_LOOKED_UP, _OF_STATES if memory else "cross_attention/"]
    unread += [rf"{part}/" for part in model.config.stacks if part != model.parts[-1]]
    unread += [] if model.config.tie_word_embeddings else ["word_embeddings/", "shared/"]
    weights = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not any(re.search(rf"(^|/){rule}", path) for rule in unread):
            # Parameters sharded over other axes are gathered: a product reads all of them.
            cut = "tensor" in jax.tree.leaves(tuple(leaf.sharding.spec))
            size = leaf.size // (mesh.shape["tensor"] if cut else 1)
            weights += size * min(leaf.dtype.itemsize, jnp.dtype(model.dtype).itemsize)
    rows, over = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    return StepReads(
        weights,
        sum(_of_rows(x, over, 1) for x in jax.tree.leaves(own)) // rows,
        sum(_of_rows(x, over, mesh.shape["sequence"]) for x in jax.tree.leaves(memory)) // rows,
    )


def _of_rows(kept: jax.ShapeDtypeStruct, heads: int, keys: int) -> int:
    """Returns the bytes per chip of keys or values [L, B, N, H, S], masks [L, B, 1, S] or queries
    [L, B, N, H], whose heads and keys are sharded over so many chips."""
    cut = heads if kept.ndim == 5 else 1
    length = kept.shape[-1]
    return math.prod(kept.shape[:-1]) // cut * -(-length // keys) * kept.dtype.itemsize
