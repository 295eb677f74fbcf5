"""The variants that `benchmarks/claims.py` compares, as changes of one configuration.

In: the configuration of the default job. Out: for every variant the changed fields, the stages that it trains, the
budgets that are evaluated, and which finished run of the same seed it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from visor_jax.config import Config, stage_config

ADAPTIVE = ("warmup", "full", "universal")  # the trained stages that all variants are compared with, step by step
ALL = ("warmup", "full", "search", "universal", "label", "policy")
TO_UNIVERSAL = ("warmup", "full", "search", "universal")
WITHOUT_TASKS = ("bars", "title", "top", "row")  # the router never sees these: one easy, one middle, two hard
REDUCTIONS = ("divprune", "vispruner", "visionzip", "hired")  # "m3" of one tile by 4 is packing by 4
REDUCED_ROW = 20  # visual positions of a row that hold a fourth of a page's 64 patches and its newline
# Layers before each drop, and what remains. FastV: half after two layers, as its authors. The other two as theirs,
# whose models have 32 layers: after the same parts of six, rounded up; SparseVLM for 192 tokens (RETAIN_TOKN).
DROPS = {
    "fastv": ((2,), (0.5,)),
    "pyramiddrop": ((2, 3, 5), (0.5, 0.25, 0.125)),
    "sparsevlm": ((1, 2, 3), (300 / 576, 200 / 576, 110 / 576)),
}
GATES = {"large": 2.0, "small": 0.1}  # beside the default's 1; the layers are multiplied by their tanh

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
      group: heading below which docs/claims.md shows it.
      title: its name there.
      stages: trained in this order; () evaluates the base itself.
      fields: (configuration) -> changed fields.
      budgets: those that are evaluated; None: every viable one, and auto.
      after: (variant, stages): copies these finished stages of the variant's run with the same seed first.
      start: (variant, stage) of the same seed that the first stage starts from; None: the base.
    """

    group: str
    title: str
    stages: tuple[str, ...]
    fields: Callable[[Config], Fields] = field(default=lambda _: {})
    budgets: tuple[str, ...] | None = None
    after: tuple[str, tuple[str, ...]] | None = None
    start: tuple[str, str] | None = None


def total_steps(config: Config) -> int:
    """Returns the optimizer steps of the adaptive stages together."""
    return sum(stage_config(config, stage).steps for stage in ADAPTIVE)


def dense(config: Config, packing: int = 1) -> Fields:
    """Trains the dense plan for as many steps as the adaptive stages, with the settings of the longest of them."""
    longest = stage_config(config, "universal")
    return {
        "model.plan": "dense",
        "model.anyres.packing": packing,
        "stage_overrides.dense.steps": total_steps(config),
        "stage_overrides.dense.learning_rate": longest.learning_rate,
        "stage_overrides.dense.schedule": longest.schedule,
        "stage_overrides.dense.end_fraction": longest.end_fraction,
        "stage_overrides.dense.trainable": longest.trainable,
        "stage_overrides.dense.group_rates": longest.group_rates,
    }


def at_budget(budget: str, times: int = 1) -> Callable[[Config], Fields]:
    """Trains all adaptive stages at one budget, for `times` as many steps."""

    def fields(config: Config) -> Fields:
        steps = {f"stage_overrides.{s}.steps": times * stage_config(config, s).steps for s in ADAPTIVE}
        return {**steps, **{f"stage_overrides.{s}.budgets": budget for s in ADAPTIVE}}

    return fields


def pattern(*kinds: str) -> Callable[[Config], Fields]:
    """Changes the layers of a super-block, and with them the numbers of cross-attention layers and of slots."""
    return lambda _: {"model.pattern": kinds}


def cross_only(*kinds: str) -> Callable[[Config], Fields]:
    """The same, trained with all slots off."""
    return lambda config: {**pattern(*kinds)(config), **at_budget("empty")(config)}


def packed(packing: int) -> Callable[[Config], Fields]:
    """Packs neighboring visual tokens into one, in every budget."""
    return lambda _: {"model.anyres.packing": packing}


def reduced(method: str) -> Callable[[Config], Fields]:
    """Keeps a fourth of the visual tokens, in every budget."""
    return lambda _: {
        "model.reduction.method": method, "model.reduction.ratio": 0.25, "data.visual_length": REDUCED_ROW,
    }  # fmt: skip


def dense_scales(config: Config) -> Fields:
    """Trains the dense plan at all scales of M3, windows of 1, 2, 4, ... patches; a fourth remains in evaluation."""
    side = config.model.vision.tile_size // config.model.vision.patch_size
    scales = tuple(4.0**-power for power in range(side.bit_length()))
    return {**dense_reduced("m3")(config), "model.reduction.scales": scales}


def dense_dropping(method: str) -> Callable[[Config], Fields]:
    """Trains the dense plan, whose later layers read fewer visual tokens, as `dense`."""

    def fields(config: Config) -> Fields:
        layers, ratios = DROPS[method]
        return {
            **dense(config),
            "model.dropping.method": method,
            "model.dropping.layers": layers,
            "model.dropping.ratios": ratios,
        }

    return fields


def dense_reduced(method: str) -> Callable[[Config], Fields]:
    """The same with the dense plan, trained as `dense`."""
    return lambda config: {**dense(config), **reduced(method)(config)}


def gate(init: str, value: float = 0.0) -> Callable[[Config], Fields]:
    """Chooses how the new cross-attention layers start."""
    return lambda _: {"model.cross.init": init, "model.cross.gate_init": value}


def _alone(budget: str) -> Variant:
    return Variant(
        "Trained alone against universal (paper, table 4)",
        f"{budget} alone, from the full stage",
        ("universal",),
        lambda _: {"stage_overrides.universal.budgets": budget},
        budgets=(budget,),
        start=("visor", "full"),
    )


_SLOTS = "Numbers of cross-attention layers and slots (paper, table 3)"
_REDUCED = "Fewer visual tokens (paper, table 2)"
_START = "How cross-attention starts"

VARIANTS: dict[str, Variant] = {
    "base": Variant("Dense", "dense base as it is", (), lambda _: {"model.plan": "dense"}, ("full",)),
    "dense": Variant("Dense", "dense, fine-tuned for the same steps", ("dense",), dense, ("full",)),
    "visor": Variant("VISOR", "VISOR", ALL),
    "cross": Variant("Cross-attention only", "trained alone", ADAPTIVE,
                     at_budget("empty"), ("empty",)),
    "cross_twice": Variant("Cross-attention only", "trained alone, twice as many steps",
                           ADAPTIVE, at_budget("empty", 2), ("empty",)),
    "alone_empty": _alone("empty"),
    "alone_0b10": _alone("0b10"),
    "alone_0b01": _alone("0b01"),
    "alone_full": _alone("full"),
    "slots_0_cross_4": Variant(_SLOTS, "4 cross-attention layers, no slot", ADAPTIVE,
                               cross_only("cross", "cross", "self"), ("empty",)),
    "slots_1_cross_1": Variant(_SLOTS, "1 cross-attention layer, 1 slot, in the last layer", TO_UNIVERSAL,
                               pattern("text", "text", "text", "text", "cross", "self")),
    "slots_1_cross_2": Variant(_SLOTS, "2 cross-attention layers, 1 slot, in the last layer", TO_UNIVERSAL,
                               pattern("text", "cross", "text", "text", "cross", "self")),
    "slots_2_early": Variant(_SLOTS, "2 cross-attention layers, 2 slots, each a layer earlier", TO_UNIVERSAL,
                             pattern("cross", "self", "text")),
    "slots_2_cross_4": Variant(_SLOTS, "4 cross-attention layers, 2 slots", TO_UNIVERSAL,
                               pattern("cross", "cross", "self")),
    "slots_3_cross_3": Variant(_SLOTS, "3 cross-attention layers, 3 slots", TO_UNIVERSAL, pattern("cross", "self")),
    "dense_packed_2": Variant(_REDUCED, "dense, 2 visual tokens packed into 1", ("dense",),
                              lambda config: dense(config, 2), ("full",)),
    "dense_packed_4": Variant(_REDUCED, "dense, 4 visual tokens packed into 1", ("dense",),
                              lambda config: dense(config, 4), ("full",)),
    "dense_shuffled_4": Variant(_REDUCED, "dense, 4 visual tokens side by side into 1", ("dense",),
                                lambda config: {**dense(config, 4), "model.anyres.packing_kind": "shuffle"},
                                ("full",)),
    "visor_packed_2": Variant(_REDUCED, "VISOR, 2 visual tokens packed into 1", TO_UNIVERSAL, packed(2)),
    "visor_packed_4": Variant(_REDUCED, "VISOR, 4 visual tokens packed into 1", TO_UNIVERSAL, packed(4)),
    **{
        f"dense_{method}_4": Variant(_REDUCED, f"dense, a fourth of the visual tokens by {name}", ("dense",),
                                     dense_reduced(method), ("full",))
        for method, name in zip(REDUCTIONS, ("DivPrune", "VisPruner", "VisionZip", "HiRED"), strict=True)
    },
    "dense_m3_4": Variant(_REDUCED, "dense, trained at all scales of M3, evaluated at a fourth of the visual tokens",
                          ("dense",), dense_scales, ("full",)),
    **{
        f"dense_{method}": Variant(_REDUCED, f"dense, visual tokens dropped between layers by {name}", ("dense",),
                                   dense_dropping(method), ("full",))
        for method, name in (("fastv", "FastV"), ("pyramiddrop", "PyramidDrop"), ("sparsevlm", "SparseVLM"))
    },
    "visor_vispruner_4": Variant(_REDUCED, "VISOR, a fourth of the visual tokens by VisPruner", TO_UNIVERSAL,
                                 reduced("vispruner")),
    "router": Variant("A router that has not seen some tasks (paper, table 8)",
                      "VISOR, router without " + ", ".join(WITHOUT_TASKS), ("label", "policy"),
                      lambda _: {"label.without": WITHOUT_TASKS}, ("full", "auto"),
                      after=("visor", ("full", "search", "universal"))),
    "start_copy_small": Variant(_START, "copy, gate 0.1", TO_UNIVERSAL, gate("copy", GATES["small"])),
    "start_copy_large": Variant(_START, "copy, gate 2", TO_UNIVERSAL, gate("copy", GATES["large"])),
    "start_zero": Variant(_START, "zero", TO_UNIVERSAL, gate("zero")),
}  # fmt: skip
STARTS = ("start_copy_small", "visor", "start_copy_large", "start_zero")  # "visor" starts as the configuration says
