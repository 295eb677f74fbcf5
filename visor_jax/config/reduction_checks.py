"""Checks of `model.reduction` together with the fields that it depends on. No JAX import."""

from __future__ import annotations

from visor_jax.architecture import ReductionArchitecture
from visor_jax.config.model_fields import ReductionConfig
from visor_jax.config.schema import Config
from visor_jax.errors import RequestError

OF_METHOD = {
    "important_share": "vispruner",
    "contextual_share": "visionzip",
    "base_share": "hired",
    "marks": "hired",
}  # field -> the method that reads it


def check_reduction(config: Config) -> None:
    """Checks that a reduction keeps fewer tokens, that no other method's field is set, and that pictures suit it.

    Raises:
      RequestError: names the fields that do not fit together.
    """
    reduction, vision = config.model.reduction, config.model.vision
    method, named = reduction.method, f"model.reduction.method={reduction.method!r}"
    for name, owner in OF_METHOD.items():
        if method != owner and getattr(reduction, name) != getattr(ReductionConfig(), name):
            raise RequestError(
                f"model.reduction.{name}={getattr(reduction, name)!r}: has no effect while {named}; expected"
                f" method={owner!r}, or leave it at {getattr(ReductionConfig(), name)!r}"
            )
    if method == "none":
        if reduction.ratio != 1:
            raise RequestError(
                f"model.reduction.ratio={reduction.ratio:g}: has no effect while {named}; name a method, or leave it"
                " at 1"
            )
        return
    for name, value, unused, why in (
        ("model.anyres.packing", config.model.anyres.packing, 1, "is a reduction of its own"),
        ("data.small_pictures", config.data.small_pictures, False, "lets pictures share tiles, which methods reduce"),
    ):
        if value != unused:
            raise RequestError(f"{name}={value}: {why}; expected {unused} with {named}")
    side, stride = vision.tile_size // vision.patch_size, ReductionArchitecture(**vars(reduction)).stride
    if method == "m3" and not 1 < stride <= side:
        raise RequestError(
            f"model.reduction.ratio={reduction.ratio:g}: averages windows of {stride} x {stride} patches with {named};"
            f" expected 1/4 to 1/{side}^2, so that windows have 2 x 2 to {side} x {side} patches"
        )
    if reduction.ratio == 1:
        raise RequestError(f"model.reduction.ratio=1: keeps every token; expected less than 1 with {named}")
