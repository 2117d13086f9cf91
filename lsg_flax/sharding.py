"""Meshes and how arrays lie on them: two tables, one from parameter paths to logical axes, one from
logical axes to mesh axes.

A program says nothing of devices: place its inputs with `shard` and `shard_batch`, run it jitted
under `jax.set_mesh(mesh)`, and XLA partitions it. The mesh axes::

    data      rows of the batch; parameters are copied
    fsdp      rows of the batch; parameters and optimizer states are cut and gathered when used
    tensor    attention heads, mlp and vocabulary
    sequence  tokens (see models/encoder.py: each shard runs the layers on its own blocks);
              parameters are cut as with fsdp

Axes: B batch, T tokens, M microbatches.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

SEQUENCE = "sequence"
AXES = ("data", "fsdp", "tensor", SEQUENCE)

# The ends of parameter paths, and the logical axes of the last dimensions there; leading ones, of
# stacked layers, are whole, and one that stands twice is cut at the first place that divides.
# Optimizer states have the paths of their parameters.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"global_layers/attention/.+", ()),  # the user's module
    (r"(embeddings/word_embeddings|shared)/embedding", ("vocab", "width")),
    (r"embeddings/(row|column)_embeddings/embedding", (None, None)),
    (r"embeddings/\w+_embeddings/embedding", (None, "width")),
    (r"embeddings_project/kernel", (None, "width")),
    (r"attention/(query|key|value|qkv|query_key)/kernel", ("width", "heads")),
    (r"attention/(query|key|value)/kernels", ("heads", "width", "heads")),
    (r"attention/(query|key|value)/bias", ("heads",)),
    (r"attention/output/kernel", ("heads", "width")),
    (r"attention/output/kernels", ("heads", "heads", "width")),
    (r"layers/mlp_up/kernel", ("width", "mlp")),
    (r"layers/mlp_up/kernels", ("mlp", "width", "mlp")),
    (r"layers/mlp_up/bias", ("mlp",)),
    (r"layers/mlp_down/kernel", ("mlp", "width")),
    (r"layers/mlp_down/kernels", ("mlp", "mlp", "width")),
    (r"head/(masked_lm/)?kernel", (None, "vocab")),
    (r"head/(masked_lm/)?bias", ("vocab",)),
    (r"(pooler|head)/\w+(/\w+)?/kernel", (None, None)),
    (r"(pooler|head)/\w+(/\w+)?/bias", (None,)),
    (r"layers/(\w+/output|mlp_down)/bias", (None,)),
    (r"layers/(attention/(gate/\w+|scale_of_\w+)|\w+_streams/\w+)", (None,)),
    (r"position_bias/\w+/\w+", (None,)),
    (r"embeddings_project/bias", (None,)),
    (r"\w*norm/(scale|bias)", (None,)),
    (r"head/decoder_weight/buffer", ("vocab", "width")),
    (r"buffer", (None,)),
)
MESH_AXES: dict[str, tuple[str, ...]] = {
    "width": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "columns": ("sequence",),  # of embedding tables, while rows are looked up
}
_WHOLE_IF_ODD = ("vocab",)  # published vocabularies are what they are (RoBERTa's has 50,265 words)


def check_axes(sizes: Mapping[str, int]) -> None:
    """Raises ValueError for sizes by axes that make no mesh of any number of devices."""
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ValueError(f"unknown mesh axes {unknown}; known are {', '.join(AXES)}.")
    wrong = {name: n for name, n in sizes.items() if type(n) is not int or (n < 1 and n != -1)}
    if wrong or list(sizes.values()).count(-1) > 1:
        shown = ", ".join(f"mesh.{name}={size!r}" for name, size in (wrong or sizes).items())
        raise ValueError(f"{shown}: give whole numbers from 1, and -1 for at most one axis.")


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and sequence, in this order: the last ones are the
    nearest neighbours.

    Args:
        data, fsdp, tensor, sequence: devices along each axis; one may be -1 and takes what is left.
            `data` does so where no other is -1.
        devices: those of all processes by default.

    Raises:
        ValueError: if the axes do not use up the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [-1 if -1 not in (fsdp, tensor, sequence) else 1] if data is None else [data]
    sizes += [fsdp, tensor, sequence]
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{asked}: give positive sizes, and -1 for at most one of them.")
    if -1 in sizes:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"a mesh of {asked} does not fit {len(devices)} devices: the product must be "
            f"{len(devices)} (-1 fills one axis). To use fewer, pass devices=jax.devices()[:n]."
        )
    types = (AxisType.Auto,) * len(AXES)  # Explicit axes break Linen's lookups
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except (ValueError, AssertionError, NotImplementedError):  # a torus that it cannot lay out
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)


def shardings_for(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The `NamedSharding` of every leaf of parameters, of an optimizer's state, or of a train
    state that holds both; concrete or abstract. Scalars and random keys are whole.

    Raises:
        ValueError: for a parameter that the table does not know, by its path, or one that the mesh
            cannot cut evenly.
    """

    def of_leaf(keys, leaf) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if leaf.ndim == 0 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _spec_of(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """The tree of `shardings_for`, placed so.

    Raises:
        ValueError: as `shardings_for`.
    """
    return jax.device_put(tree, shardings_for(tree, mesh))


def sharded_init(function: Callable, *args: Any, mesh: Mesh) -> Any:
    """`function(*args)`, whose results lie as `shardings_for` says from the start: no device ever
    holds the whole.

    Example:
        params = sharded_init(lambda key: model.init(key, ids)["params"], key, mesh=mesh)
    """
    shardings = shardings_for(jax.eval_shape(function, *args), mesh)
    return jax.jit(function, out_shardings=shardings)(*args)


def batch_shardings(
    batch: Mapping[str, Any], mesh: Mesh, *, microbatches: bool = False
) -> dict[str, NamedSharding]:
    """How a batch lies: rows over data and fsdp, tokens over sequence.

    Args:
        batch: arrays or shapes by Hugging Face's names; [B, ...] or, with `microbatches`,
            [M, B, ...]. Arrays of the shape of `input_ids` have tokens.

    Raises:
        ValueError: if rows or tokens cannot be cut evenly.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    lead = tuple(tokens.shape) if tokens is not None else ()
    lead = lead[:-1] if "input_ids" not in batch else lead
    first = int(microbatches)
    shardings = {}
    for name, array in batch.items():
        names: list[str | None] = [None] * len(array.shape)
        if len(array.shape) > first:
            names[first] = "batch"
        if tuple(array.shape[: len(lead)]) == lead and len(lead) > first + 1:
            names[len(lead) - 1] = "length"
        spec = [_axes_of(part, mesh) for part in names]
        for size, part, axes in zip(array.shape, names, spec, strict=True):
            count = _count(axes, mesh)
            if size % count:
                what, remedy = (
                    ("rows", "choose another batch size")
                    if part == "batch"
                    else ("tokens", "pad to such a length")
                )
                raise ValueError(
                    f"{name} {tuple(array.shape)} has {size} {what}, which {_said(axes, mesh)} "
                    f"cannot cut evenly; {remedy}, a multiple of {count}."
                )
        shardings[name] = NamedSharding(mesh, _spec(spec))
    return shardings


def check_batches(
    mesh: Mesh,
    rows: Mapping[str, int],
    buckets: Iterable[int],
    needs_padding: Callable[[int, int], int] | None,
) -> None:
    """Checks what a mesh has to cut before anything is compiled.

    Args:
        rows: numbers of rows in a batch, by the names of the options that say so.
        buckets: lengths that rows are padded to.
        needs_padding: `LSGConfig.needs_padding` of a model with LSG attention.

    Raises:
        ValueError: for rows or tokens that cannot be cut evenly, and for shards of the sequence
            that are too short for the pattern.
    """
    shards = mesh.shape[SEQUENCE]
    for (name, size), bucket in itertools.product(rows.items(), buckets):
        try:
            batch_shardings({"input_ids": jax.ShapeDtypeStruct((size, bucket), np.int32)}, mesh)
        except ValueError as error:
            raise ValueError(f"{name} gives {size} rows of {bucket} tokens: {error}") from error
        if shards > 1 and needs_padding is not None:
            needs_padding(bucket, shards)


def check_devices(mesh: Mesh) -> None:
    """Raises ValueError for a mesh that reaches into other processes, where each process is to do
    its own work."""
    if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
        raise ValueError(
            "the mesh has devices of other processes; give each process its own documents and a "
            "mesh of its own devices: make_mesh(..., devices=jax.local_devices())."
        )


def shard_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, microbatches: bool = False
) -> dict[str, jax.Array]:
    """A batch from the host, placed as `batch_shardings` says.

    With several processes each gives its own rows, as many as every other; the result is the global
    batch.

    Raises:
        ValueError: as `batch_shardings`.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    rows = int(microbatches)

    def global_shape(array) -> tuple[int, ...]:
        shape = list(array.shape)
        shape[rows] *= processes
        return tuple(shape)

    arrays = {name: np.asarray(array) for name, array in batch.items()}
    shapes = {name: jax.ShapeDtypeStruct(global_shape(a), a.dtype) for name, a in arrays.items()}
    shardings = batch_shardings(shapes, mesh, microbatches=microbatches)
    if processes == 1:
        return jax.device_put(arrays, shardings)
    return {
        name: jax.make_array_from_process_local_data(shardings[name], a, shapes[name].shape)
        for name, a in arrays.items()
    }


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks XLA to lay `x` out by logical axes on the ambient mesh; does nothing without one.

    It never changes a number. Axes that do not divide, and those that a surrounding `jax.shard_map`
    has taken, are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    free = {axis for axis in mesh.auto_axes if mesh.shape[axis] > 1}
    spec = []
    for size, name in zip(x.shape, names, strict=True):
        axes = tuple(axis for axis in MESH_AXES.get(name or "", ()) if axis in free)
        whole = not axes or size % math.prod(mesh.shape[axis] for axis in axes)
        spec.append(None if whole else axes)
    return jax.lax.with_sharding_constraint(x, _spec(spec)) if any(spec) else x


def over_rows(function: Callable) -> Callable:
    """The function of arrays [B, ...] on every device's own rows, for what XLA gives each device
    all rows of. It is called as it is without a mesh, and for rows that do not divide."""

    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        free = [axis for axis in MESH_AXES["batch"] if axis in mesh.auto_axes]
        axes = tuple(axis for axis in free if mesh.shape[axis] > 1)
        if not axes or len(arrays[0]) % math.prod(mesh.shape[axis] for axis in axes):
            return function(*arrays)
        rows, names = PartitionSpec(axes), set(axes)
        return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names=names)(*arrays)

    return run


def sequence_shards() -> int:
    """How many shards of tokens the ambient mesh asks for; 1 without one, and inside a shard."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[SEQUENCE] if SEQUENCE in mesh.auto_axes else 1


def over_sequence(function: Callable, *, in_axes: Any, out_axes: Any) -> Callable:
    """`jax.shard_map` over the ambient mesh's sequence axis; the other axes stay with XLA.

    Args:
        in_axes, out_axes: as in `jax.vmap`: the axis of each argument and result that is cut, None
            for those that every shard has whole.
    """

    def specs(axes):
        return jax.tree.map(
            lambda axis: PartitionSpec(*() if axis is None else (*[None] * axis, SEQUENCE)),
            axes,
            is_leaf=lambda axis: axis is None,
        )

    def run(*arguments):
        # What every shard has whole crosses in float32: its gradient is a sum over the shards.
        dtypes = jax.tree.map(lambda x: x.dtype, arguments)
        widened = tuple(
            jax.tree.map(_widened, argument) if axis is None else argument
            for argument, axis in zip(arguments, in_axes, strict=True)
        )
        return jax.shard_map(
            lambda *wide: function(*jax.tree.map(lambda x, dtype: x.astype(dtype), wide, dtypes)),
            in_specs=specs(in_axes),
            out_specs=specs(out_axes),
            axis_names={SEQUENCE},
            check_vma=False,  # hand-written backward passes do not say along which axes they vary
        )(*widened)

    return run


def _widened(x: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x


def check_heads(num_attention_heads: int) -> None:
    """Raises ValueError if the ambient mesh cannot give each device whole heads."""
    count = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if num_attention_heads % count:
        raise ValueError(
            f"tensor={count} does not divide num_attention_heads={num_attention_heads}; choose one "
            "of its divisors."
        )


def _spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    kernel, _, adapter = path.partition("_lora_")  # of training/lora.py: lies as its kernel
    rules = [names for end, names in PARAMETER_AXES if re.search(rf"(^|/|_){end}$", kernel)]
    if not rules:
        raise ValueError(
            f"no rule says how to shard {path} {shape}; add its path to "
            "lsg_flax.sharding.PARAMETER_AXES."
        )
    names = (None,) * (len(shape) - len(rules[0])) + rules[0]
    rank = len(names) - {"a": 1, "b": 2}.get(adapter, 0)
    spec = []
    for place, (size, name) in enumerate(zip(shape, names, strict=True)):
        axes = _axes_of(name, mesh)
        if axes in spec or place == rank:
            axes = None
        if size % _count(axes, mesh):
            if name not in (*_WHOLE_IF_ODD, *names[place + 1 :]):
                raise ValueError(
                    f"{_said(axes, mesh)} cannot cut the {name} axis of {path} {shape} evenly: "
                    f"{size} is no multiple of {_count(axes, mesh)}. Choose a mesh that divides it."
                )
            axes = None
        spec.append(axes)
    return _spec(spec)


def _spec(axes: Sequence[tuple[str, ...] | None]) -> PartitionSpec:
    """In the shortest form, as XLA returns it: another would count as another sharding, and
    compile anew."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*(part[0] if part and len(part) == 1 else part for part in axes))


def _axes_of(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis that are more than one device."""
    axes = tuple(axis for axis in MESH_AXES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1)
    return axes or None


def _count(axes: tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes or ())


def _said(axes: tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes or ())
