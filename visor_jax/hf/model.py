"""A dense checkpoint made a VISOR model: the new layers, and what differs between two architectures.

In: a parameter tree as `visor_jax.hf.read` reads it. Out: the tree of a VISOR plan, every array in its sharding.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from visor_jax.architecture import Architecture
from visor_jax.model.cross_init import start_cross_attention
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale.sharding import param_shardings
from visor_jax.tree import flatten, unflatten


def made_visor(params: Params, arch: Architecture, mesh: Mesh, key: jax.Array) -> tuple[Params, dict[str, int]]:
    """Gives a dense model's parameters what `arch`, the same with a VISOR plan, has beside them.

    Returns:
      The whole tree, and how many parameters are new, by the path of the part that they belong to.
    """
    shapes = abstract_params(arch)
    sizes, places, old = (flatten(tree) for tree in (shapes, param_shardings(shapes, mesh), params))
    missing = [path for path in sizes if path not in old]

    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        made = flatten(init_params(arch, key))
        return {path: made[path] for path in missing}  # the rest is never computed

    weights, cross = jax.random.split(key)
    new = jax.jit(fresh, out_shardings={path: places[path] for path in missing})(weights)
    started = flatten(start_cross_attention(unflatten({**old, **new}), arch, cross))
    whole = unflatten({path: jax.device_put(x, places[path]) for path, x in started.items()})
    counts: dict[str, int] = {}
    for path in missing:
        part = "/".join(path.split("/")[:2]) if path.startswith("blocks/") else path.split("/")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(sizes[path].shape))
    return whole, counts


def differences(stored: Architecture, asked: Architecture) -> list[str]:
    """["model.text.hidden_size is 896 there and 64 here"], for every field of what is stored that `asked` has not."""
    sections = (
        ("text", "vision", "anyres") if stored.plan == "dense" else ("text", "vision", "anyres", "cross", "policy")
    )
    found = []
    for section in sections:
        theirs, ours = getattr(stored, section), getattr(asked, section)
        for name in vars(theirs):
            # How parameters start that are there already, and a limit: neither is a shape.
            no_shape = name == "init" or name.endswith("_init") or name == "max_positions"
            if not no_shape and getattr(theirs, name) != getattr(ours, name):
                found.append(f"model.{section}.{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here")
    return found
