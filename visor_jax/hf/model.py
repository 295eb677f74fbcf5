"""Adds VISOR's new layers to a dense checkpoint, and compares two architectures.

In: a parameter tree as `visor_jax.hf.read` reads it. Out: the tree of a VISOR plan, every array in its sharding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import Mesh

from visor_jax.architecture import Architecture
from visor_jax.errors import RequestError
from visor_jax.hf.read import Checkpoint
from visor_jax.model.initializers import start_cross_attention
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale.sharding import param_shardings
from visor_jax.tree import flatten, unflatten


def add_visor_params(params: Params, arch: Architecture, mesh: Mesh, key: jax.Array) -> tuple[Params, dict[str, int]]:
    """Initializes the parameters that a VISOR plan has and a dense model lacks, and adds them to the tree.

    Args:
      params: the dense model's tree.
      arch: the same architecture with a VISOR plan.
      mesh: the arrays are sharded over it.
      key: for the initial values.

    Returns:
      The complete tree, and the number of new parameters by the path of the module that holds them.
    """
    abstract = abstract_params(arch)
    shapes, shardings, old = (flatten(tree) for tree in (abstract, param_shardings(abstract, mesh), params))
    missing = [path for path in shapes if path not in old]

    def init_missing(key: jax.Array) -> dict[str, jax.Array]:
        initial = flatten(init_params(arch, key))
        return {path: initial[path] for path in missing}  # XLA removes the computation of the rest

    weights_key = jax.random.split(key)[0]  # the first of two, as in versions that drew from both
    new = jax.jit(init_missing, out_shardings={path: shardings[path] for path in missing})(weights_key)
    leaves = flatten(start_cross_attention(unflatten({**old, **new}), arch))
    complete = unflatten({path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()})
    counts: dict[str, int] = {}
    for path in missing:
        part = "/".join(path.split("/")[:2]) if path.startswith("blocks/") else path.split("/")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(shapes[path].shape))
    return complete, counts


def fitted(checkpoint: Checkpoint, arch: Architecture, refusal: str, may_differ: Collection[str] = ()) -> Checkpoint:
    """Returns a checkpoint whose layers are stored under the names of `arch`, after checking that it has its shape.

    Args:
      refusal: begins the message if it does not fit.
      may_differ: fields of a section of `arch` in which they may differ.

    Raises:
      RequestError: sizes differ, or a VISOR plan would have to start a dense one.
    """
    if checkpoint.arch.plan == "dense":
        renamed = dataclasses.replace(checkpoint.arch, pattern=arch.pattern, head_layers=arch.head_layers)
        checkpoint = dataclasses.replace(checkpoint, arch=renamed)
    if problems := differences(checkpoint.arch, arch, may_differ):
        raise RequestError(f"{refusal}: another shape than --config asks for: {'; '.join(problems)}")
    if checkpoint.arch.plan == "visor" and arch.plan == "dense":
        raise RequestError(f"{refusal}: holds a VISOR plan, and model.plan is 'dense'; expected 'visor'")
    return checkpoint


def differences(stored: Architecture, wanted: Architecture, may_differ: Collection[str] = ()) -> list[str]:
    """Lists the fields in which two architectures differ: ["model.text.hidden_size is 896 there and 64 here"].

    Fields of a section that `may_differ` names are left out.
    """
    sections = (
        ("text", "vision", "anyres") if stored.plan == "dense" else ("text", "vision", "anyres", "cross", "policy")
    )
    lines = []
    for name in ("pattern", "head_layers"):
        if stored.plan == "visor" and getattr(stored, name) != getattr(wanted, name):
            lines.append(
                f"model.{name} is {_value(getattr(stored, name))} there and {_value(getattr(wanted, name))} here"
            )
    for section in sections:
        theirs, ours = getattr(stored, section), getattr(wanted, section)
        for name in vars(theirs):
            # Settings of initialization and of rows, and the limit of positions do not change a stored parameter.
            is_irrelevant = name in ("init", "max_positions", "small_pictures", *may_differ) or name.endswith("_init")
            if not is_irrelevant and getattr(theirs, name) != getattr(ours, name):
                lines.append(f"model.{section}.{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here")
    return lines


def _value(setting: int | tuple[str, ...]) -> str:
    return ",".join(setting) if isinstance(setting, tuple) else str(setting)
