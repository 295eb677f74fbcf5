"""Checks of `model.reduction` and `model.dropping` together with the fields they depend on. No JAX import."""

from __future__ import annotations

from visor_jax.architecture import DROPPINGS, ReductionArchitecture
from visor_jax.config.model_fields import DroppingConfig, ReductionConfig
from visor_jax.config.schema import Config
from visor_jax.errors import RequestError

OF_METHOD = {
    "scales": "m3",
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
    anyres = config.model.anyres
    if anyres.packing == 1 and anyres.packing_kind != "mean":
        raise RequestError(
            f"model.anyres.packing_kind={anyres.packing_kind!r}: has no effect while model.anyres.packing=1; expected"
            " packing of 2 or 4, or leave it at 'mean'"
        )
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
    if method == "m3":
        _check_windows(reduction, vision.tile_size // vision.patch_size)
    elif reduction.ratio == 1:
        raise RequestError(f"model.reduction.ratio=1: keeps every token; expected less than 1 with {named}")


def _check_windows(reduction: ReductionConfig, side: int) -> None:
    """Checks the ratio and the scales of "m3" with tiles of `side` x `side` patches."""
    scales = reduction.scales
    if scales and reduction.ratio not in scales:
        raise RequestError(
            f"model.reduction.ratio={reduction.ratio:g}: expected one of model.reduction.scales={scales}, at which the"
            " model is evaluated"
        )
    if len(scales) == 1:
        raise RequestError(f"model.reduction.scales={scales}: expected several, or none to train at the ratio alone")
    strides: dict[int, float] = {}
    for ratio in scales or (reduction.ratio,):
        stride = ReductionArchitecture("m3", ratio).stride
        if not (ratio == 1 and scales) and not 1 < stride <= side:
            field = "scales: " if scales else "ratio="
            raise RequestError(
                f"model.reduction.{field}{ratio:g}: averages windows of {stride} x {stride} patches with"
                f" model.reduction.method='m3'; expected {'1, or ' if scales else ''}1/4 to 1/{side}^2, so that windows"
                f" have 2 x 2 to {side} x {side} patches"
            )
        if stride in strides:
            raise RequestError(
                f"model.reduction.scales={scales}: {strides[stride]:g} and {ratio:g} both average windows of {stride} x"
                f" {stride} patches; expected one of them"
            )
        strides[stride] = ratio


def check_dropping(config: Config) -> None:
    """Checks that drops fit the plan and its layers, and that no other method's field is set.

    Raises:
      RequestError: names the fields that do not fit together.
    """
    dropping, model = config.model.dropping, config.model
    named, default = f"model.dropping.method={dropping.method!r}", DroppingConfig()
    for name, owners in (("layers", DROPPINGS[1:]), ("ratios", DROPPINGS[1:]), ("score", ("fastv",))):
        if dropping.method not in owners and getattr(dropping, name) != getattr(default, name):
            raise RequestError(
                f"model.dropping.{name}={getattr(dropping, name)!r}: has no effect while {named}; expected method"
                f" {' or '.join(map(repr, owners))}, or leave it at {getattr(default, name)!r}"
            )
    if dropping.method == "none":
        return
    if model.plan != "dense":
        raise RequestError(f"{named}: drops tokens between the layers of a dense plan; expected model.plan='dense'")
    if model.bidirectional_vision:
        raise RequestError(
            "model.bidirectional_vision=True: lets visual tokens see all of their picture; expected False with"
            f" {named}, which drops some of them"
        )
    layers, ratios, count = dropping.layers, dropping.ratios, model.text.num_layers
    if not layers or list(layers) != sorted({*layers}) or not 0 < layers[0] <= layers[-1] < count:
        raise RequestError(
            f"model.dropping.layers={layers}: expected different numbers from 1 to {count - 1}, ascending, such as"
            f" {'(2,)' if dropping.method == 'fastv' else (count // 4, count // 2, 3 * count // 4)}"
        )
    if dropping.method == "fastv" and len(layers) > 1:
        raise RequestError(f"model.dropping.layers={layers}: expected one number, {named} drops once")
    if len(ratios) != len(layers) or list(ratios) != sorted(ratios, reverse=True):
        raise RequestError(
            f"model.dropping.ratios={ratios}: expected {len(layers)} shares, descending, one for each of"
            f" model.dropping.layers={layers}"
        )
