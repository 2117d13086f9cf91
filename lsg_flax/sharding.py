"""Meshes, and how parameters and batches are sharded over them: two tables, one from parameter
paths to logical axes, one from logical axes to mesh axes.

Programs do not mention devices. Place a program's inputs with `shard` and `shard_batch` and run it
jitted under `jax.set_mesh(mesh)`: XLA partitions it. What each mesh axis shards::

    data      rows of the batch; parameters are replicated
    fsdp      rows of the batch; parameters and optimizer states, gathered when used
    tensor    attention heads, mlp and vocabulary
    sequence  tokens (see models/encoder.py: each shard runs the layers on its own blocks);
              parameters and optimizer states as with fsdp

Axes: B batch, T tokens, M microbatches.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")
SEQUENCE = "sequence"
AXES = ("data", "fsdp", "tensor", SEQUENCE)

# Ends of parameter paths, and the logical axes of the last dimensions. Leading dimensions, those of
# stacked layers, are not sharded. A logical axis that is listed twice is sharded at the first
# dimension that divides evenly. Optimizer states have the paths of their parameters.
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
# Replicated where the mesh does not divide them: published vocabularies have any size (RoBERTa's
# has 50,265 words).
_WHOLE_IF_ODD = ("vocab",)


def check_axes(sizes: Mapping[str, int]) -> None:
    """Raises ValueError if no number of devices can form a mesh of these sizes per axis."""
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ValueError(f"unknown mesh axes {unknown}; known are {', '.join(AXES)}.")
    wrong = {name: n for name, n in sizes.items() if type(n) is not int or (n < 1 and n != -1)}
    if wrong or list(sizes.values()).count(-1) > 1:
        shown = ", ".join(f"mesh.{name}={size!r}" for name, size in (wrong or sizes).items())
        raise ValueError(f"{shown}: give integers of at least 1, and -1 for at most one axis.")


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh with the axes data, fsdp, tensor and sequence, in this order: devices along the
    last axes are nearest to each other.

    Args:
        data, fsdp, tensor, sequence: number of devices along each axis. One may be -1: it takes all
            devices that are left. By default `data` is -1, or 1 if another axis is -1.
        devices: the devices to use; by default those of all processes.

    Raises:
        ValueError: if the product of the sizes is not the number of devices.
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
    except (ValueError, AssertionError, NotImplementedError):  # JAX cannot map it to the torus
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError for a mesh with other axes than those of `make_mesh`, over which nothing
    would be sharded, and for axes of the type Explicit, `jax.make_mesh`'s default, which Flax's
    modules cannot follow."""
    unknown = {name: size for name, size in mesh.shape.items() if name not in AXES and size > 1}
    if unknown or mesh.explicit_axes:
        shown = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"the mesh has the axes {shown}, of the types {mesh.axis_types}; its axes must be "
            f"among {', '.join(AXES)}, and of the type Auto. Make it with "
            "lsg_flax.sharding.make_mesh."
        )


def shardings_for(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the `NamedSharding` of every leaf of a tree.

    Args:
        tree: parameters, an optimizer's state, or a train state of both; concrete or abstract
            arrays. Scalars and random keys are replicated.
        mesh: a mesh with the axes of `make_mesh`.

    Raises:
        ValueError: for a parameter whose path `PARAMETER_AXES` does not match, or one that the mesh
            does not divide evenly; and as `check_mesh`.
    """
    check_mesh(mesh)

    def of_leaf(keys, leaf) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if leaf.ndim == 0 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _spec_of(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Places a tree on the devices of a mesh, sharded as `shardings_for` says.

    Raises:
        ValueError: as `shardings_for`.
    """
    return jax.device_put(tree, shardings_for(tree, mesh))


def sharded_init(function: Callable, *args: Any, mesh: Mesh) -> Any:
    """Returns `function(*args)`, whose results are sharded as `shardings_for` says from the start:
    no device ever holds the whole tree.

    Example:
        params = sharded_init(lambda key: model.init(key, ids)["params"], key, mesh=mesh)
    """
    shardings = shardings_for(jax.eval_shape(function, *args), mesh)
    return jax.jit(function, out_shardings=shardings)(*args)


def batch_shardings(
    batch: Mapping[str, Any], mesh: Mesh, *, microbatches: bool = False
) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a batch: rows over data and fsdp, tokens over sequence.

    Args:
        batch: arrays or shapes by Hugging Face's names; [B, ...] or, with `microbatches`,
            [M, B, ...]. Arrays that begin with the shape of `input_ids` have a token axis.
        mesh: a mesh with the axes of `make_mesh`.
        microbatches: whether the arrays have a leading axis M, which is not sharded.

    Raises:
        ValueError: if the mesh does not divide the rows or the tokens evenly; and as `check_mesh`.
    """
    check_mesh(mesh)
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
                    f"cannot split evenly; {remedy}, a multiple of {count}."
                )
        shardings[name] = NamedSharding(mesh, _spec(spec))
    return shardings


def check_batches(
    mesh: Mesh,
    rows: Mapping[str, int],
    buckets: Iterable[int],
    needs_padding: Callable[[int, int], int] | None,
) -> None:
    """Checks, before anything is compiled, that a mesh divides all batches evenly.

    Args:
        mesh: a mesh with the axes of `make_mesh`.
        rows: numbers of rows in a batch, by the names of the options that set them.
        buckets: lengths in tokens that rows are padded to.
        needs_padding: `LSGConfig.needs_padding` of a model with LSG attention.

    Raises:
        ValueError: if the mesh does not divide rows or tokens evenly, or if shards of the sequence
            are too short for the pattern; and as `check_mesh`.
    """
    check_mesh(mesh)
    shards = mesh.shape.get(SEQUENCE, 1)
    for (name, size), bucket in itertools.product(rows.items(), buckets):
        try:
            batch_shardings({"input_ids": jax.ShapeDtypeStruct((size, bucket), np.int32)}, mesh)
        except ValueError as error:
            raise ValueError(f"{name} gives {size} rows of {bucket} tokens: {error}") from error
        if shards > 1 and needs_padding is not None:
            needs_padding(bucket, shards)


def check_devices(mesh: Mesh) -> None:
    """Raises ValueError if the mesh has devices of other processes, for work that each process does
    on its own."""
    if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
        raise ValueError(
            "the mesh has devices of other processes; give each process its own documents and a "
            "mesh of its local devices: make_mesh(..., devices=jax.local_devices())."
        )


def shard_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, microbatches: bool = False
) -> dict[str, jax.Array]:
    """Places a batch from the host on the mesh, sharded as `batch_shardings` says: arrays [B, ...],
    or with `microbatches` [M, B, ...].

    With several processes each passes its own rows, the same number in each process; the result is
    the global batch.

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
    """Asks XLA to shard `x` by logical axes over the ambient mesh; does nothing without a mesh.

    It never changes values.

    Args:
        x: any array, such as [B, T, D].
        *names: the logical axis (a key of `MESH_AXES`) of each dimension of `x`, None for
            dimensions that are not sharded. Axes that the mesh does not divide, and mesh axes that
            an enclosing `jax.shard_map` uses, are skipped.
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


def with_auto_axes(function: Callable[_Arguments, _Returned]) -> Callable[_Arguments, _Returned]:
    """Wraps a function of a query and other arrays, whose result has the shape of the query: if the
    query is sharded over axes of the type Explicit (`jax.make_mesh`'s default), XLA chooses the
    shardings inside, and the result is sharded as the query."""

    @functools.wraps(function)
    def run(*arrays: _Arguments.args, **options: _Arguments.kwargs) -> _Returned:
        query = arrays[0] if arrays else options.get("query")
        sharding = jax.typeof(query).sharding if hasattr(query, "shape") else None
        if sharding is None or not sharding.mesh.explicit_axes:
            return function(*arrays, **options)
        leaves, tree = jax.tree.flatten((arrays, options))
        given = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

        def inside(given):
            filled = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
            arrays, options = jax.tree.unflatten(tree, filled)
            return cast(Any, function)(*arrays, **options)

        of_devices: Any = jax.sharding.auto_axes(inside, out_sharding=sharding)
        return of_devices(given)

    return run


def over_rows(function: Callable) -> Callable:
    """Wraps a function of arrays [B, ...] so that each device runs it on its own rows.

    It is for operations for which XLA would gather all rows on every device. Without a mesh, or if
    the mesh does not divide the rows, the function is called directly.
    """

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
    """Returns the number of sequence shards of the ambient mesh; 1 without a mesh, and inside a
    shard."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[SEQUENCE] if SEQUENCE in mesh.auto_axes else 1


def over_sequence(function: Callable, *, in_axes: Any, out_axes: Any) -> Callable:
    """Applies `jax.shard_map` over the ambient mesh's sequence axis; XLA partitions the other axes.

    Args:
        function: what each shard runs.
        in_axes, out_axes: as in `jax.vmap`: the sharded axis of each argument and result, None for
            those that every shard has whole.
    """

    def specs(axes):
        return jax.tree.map(
            lambda axis: PartitionSpec(*() if axis is None else (*[None] * axis, SEQUENCE)),
            axes,
            is_leaf=lambda axis: axis is None,
        )

    def run(*arguments):
        # Arguments that every shard has whole are passed in float32, because their gradients are
        # sums over the shards.
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
    """Raises ValueError if the tensor axis of the ambient mesh does not divide
    `num_attention_heads`, a number of heads."""
    count = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if num_attention_heads % count:
        raise ValueError(
            f"tensor={count} does not divide num_attention_heads={num_attention_heads}; choose one "
            "of its divisors."
        )


def _spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    kernel, _, adapter = path.partition("_lora_")  # of training/lora.py: sharded as its kernel
    rules = [names for end, names in PARAMETER_AXES if re.search(rf"(^|/|_){end}$", kernel)]
    if not rules:
        raise ValueError(
            f"no rule says how to shard {path} {shape}; add a rule for its path to "
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
                    f"{_said(axes, mesh)} cannot split the {name} axis of {path} {shape} evenly: "
                    f"{size} is not a multiple of {_count(axes, mesh)}. Choose a mesh that divides "
                    "it."
                )
            axes = None
        spec.append(axes)
    return _spec(spec)


def _spec(axes: Sequence[tuple[str, ...] | None]) -> PartitionSpec:
    """The spec in its shortest form, as XLA returns it: JAX would take any other form for another
    sharding and recompile."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*(part[0] if part and len(part) == 1 else part for part in axes))


def _axes_of(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis that have more than one device."""
    axes = tuple(axis for axis in MESH_AXES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1)
    return axes or None


def _count(axes: tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes or ())


def _said(axes: tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes or ())
