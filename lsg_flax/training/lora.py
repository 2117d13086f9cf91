"""LoRA (arXiv 2106.09685): projections are frozen, and two thin matrices per projection learn.

The adapters of ".../query/kernel" are ".../query/kernel_lora_a" and "..._lora_b" in the same tree,
so that optimizer, meshes and checkpoints treat them as any parameter. Losses and scores read such
trees; call `merge_lora` before you call `model.apply` yourself. (Qwix, which adds adapters to
Linen's models, cannot handle projections whose backward pass is written by hand.)

Axes: L layers, D model width, F features of a projection.
"""

import dataclasses
import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from lsg_flax.models import Params
from lsg_flax.sharding import sharded_init

_A, _B, _SCALING = "_lora_a", "_lora_b", "lora_scaling/buffer"
_KERNELS = ("kernel", "kernels")  # one product, or one for each group
_STACKS = ("shared", "encoder", "decoder")
# Beside the adapters, the parameters learn that a pattern of frozen ones leaves: `frozen_beside`.
_FROZEN = rf"^{_SCALING}$|^(?!.*({_A}|{_B})$)(?=.*?(?:{{}}))"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections get adapters (arXiv 2106.09685); the fields have the names of PEFT's
    LoraConfig.

    Attributes:
        r: rank, the number of features between the two matrices.
        alpha: the adapters' product has the factor `alpha / r`.
        target_modules: ends of paths in the stacks of layers, such as "query", "mlp_up" or
            "decoder/layers/attention/value".
    """

    r: int = 8
    alpha: float = 8.0
    target_modules: tuple[str, ...] = ("query", "value")

    def kernels(self, params: Params) -> list[str]:
        """Returns the paths of the kernels that get adapters.

        Raises:
            ValueError: if a name matches no projection of the model.
        """
        paths = flax.traverse_util.flatten_dict(params, sep="/")
        modules = {
            path.rpartition("/")[0]: path
            for path in paths
            if path.split("/")[-1] in _KERNELS and {*path.split("/")} & {*_STACKS}
        }
        chosen: set[str] = set()
        for name in self.target_modules:
            found = [module for module in modules if f"/{module}".endswith(f"/{name}")]
            if not found:
                there = sorted({module.rpartition("/layers/")[2] for module in modules})
                raise ValueError(
                    f"lora_target_modules={list(self.target_modules)}: the model has no {name!r}; "
                    f"give ends of the paths of its projections: {', '.join(there)}."
                )
            chosen |= {modules[module] for module in found}
        return sorted(chosen)


def add_lora(params: Params, lora: LoRA, key: PRNGKeyArray, *, mesh: Mesh | None = None) -> Params:
    """Returns the parameters with adapters that change nothing yet: "_lora_a" [L, D, r] is drawn
    uniformly from +-1 / sqrt(D), as in PEFT, and "_lora_b" [L, r, F] is zero. (arXiv 2106.09685,
    section 4.1)

    Args:
        mesh: the mesh that the parameters are sharded over; adapters are sharded as their kernel.

    Raises:
        ValueError: as `LoRA.kernels`.
    """
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    kernels = {path: flat[path] for path in lora.kernels(params)}

    def draw(key: PRNGKeyArray) -> Params:
        drawn: dict[str, Any] = {_SCALING: jnp.float32(lora.alpha / lora.r)}
        for number, (path, kernel) in enumerate(kernels.items()):
            *lead, width, features = kernel.shape
            own, bound = jax.random.fold_in(key, number), 1 / math.sqrt(width)
            shape, dtype = (*lead, width, lora.r), kernel.dtype
            drawn[path + _A] = jax.random.uniform(own, shape, dtype, -bound, bound)
            drawn[path + _B] = jnp.zeros((*lead, lora.r, features), dtype)
        return flax.traverse_util.unflatten_dict(drawn, sep="/")

    made = draw(key) if mesh is None else sharded_init(draw, key, mesh=mesh)
    flat |= flax.traverse_util.flatten_dict(made, sep="/")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(params: Params) -> Params:
    """Returns the parameters as the model has them, with the adapters' products added to their
    kernels (arXiv 2106.09685, section 4.1); a tree without adapters is returned unchanged."""
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    if _SCALING not in flat:
        return params
    scaling = jax.lax.stop_gradient(flat.pop(_SCALING))
    for path in [path.removesuffix(_A) for path in flat if path.endswith(_A)]:
        change = jnp.einsum("...dk,...kf->...df", flat.pop(path + _A), flat.pop(path + _B))
        flat[path] += (scaling * change).astype(change.dtype)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def frozen_beside(frozen: str) -> str:
    """Returns the pattern of frozen parameters with LoRA: matches of `frozen`, except adapters."""
    return _FROZEN.format(frozen)
