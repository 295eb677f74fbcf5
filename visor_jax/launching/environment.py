"""The environment variables of every process of a launched run."""

from __future__ import annotations

from visor_jax.launching.description import Launch
from visor_jax.scale.xla_flags import set_flags


def environment(launch: Launch) -> dict[str, str]:
    """Returns variables and their values: XLA's flags for the chip, the platform, the cache of compiled programs.

    `JAX_PLATFORMS` makes a machine whose accelerator does not work fail instead of training on its CPU. With a workdir
    in a bucket the cache is in the folder next to it, so that a machine that replaces another compiles nothing again.
    """
    chip = launch.machines.chip
    variables: dict[str, str] = {"JAX_PLATFORMS": "tpu,cpu" if chip.kind == "tpu" else "cuda,cpu"}
    set_flags(variables, chip.name)
    if launch.in_bucket:
        parent = launch.workdir.rpartition("/")[0]
        variables["VISOR_COMPILE_CACHE"] = f"{parent}/compile_cache"
    return variables
