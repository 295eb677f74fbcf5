"""Every field of a configuration: its name, default, meaning, and which values make sense.

Ground floor: no JAX import. `SCHEMA` is the one table; `visor_jax.config` builds configurations from it, reads
files and overrides against it, and checks what spans several fields. A field's type is that of its default.

In the messages a field reads `train.steps`; on the command line it is `--config.train.steps=100`. What holds for one
stage only stands in `stage_overrides.<stage>.<field of train>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax import architecture as most

ASSETS = Path(__file__).parents[1] / "data" / "assets"
# Names of the tokenizers that come with the package. The first is that of the generated data set of the same name.
BUILT_IN = tuple(sorted(file.parent.name for file in ASSETS.glob("*/tokenizer.json")))

STAGES = ("base", "dense", "warmup", "full", "search", "universal", "label", "policy")
OFFLINE_STAGES = ("search", "label")  # passes that evaluate; they train nothing
TRAINED_STAGES = tuple(stage for stage in STAGES if stage not in OFFLINE_STAGES)

DEFAULT_MAX_PIXELS = 89_478_485  # of a picture, unless a configuration says otherwise; Pillow's own bound for a warning
PILLOW_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # Pillow opens none that is larger


# Licenses as the Hugging Face hub spells them; it refuses a model card with another one.
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 gemma unknown other
"""
LICENSES = tuple(_LICENSES.split())


@dataclass(frozen=True)
class Rule:
    """Which values of a field make sense, and how a message says so."""

    holds: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Field:
    """One field: its default (which also gives its type), its meaning, and its rule.

    `element` is the type of a tuple's elements; a tuple of types means tuples of just these.
    """

    default: Any
    meaning: str
    rule: Rule | None = None
    element: type | tuple[type, ...] = str


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"a number of at least {low}")


def above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"a number above {low}")


def within(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"a number from {low} to {high}")


def below_one() -> Rule:
    return Rule(lambda value: 0 <= value < 1, "a number from 0 to less than 1")


def one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, "one of " + ", ".join(repr(name) for name in names))


def some_of(names: Iterable[str]) -> Rule:
    """A tuple of different names in their order here."""
    order = list(names)

    def holds(value: tuple[str, ...]) -> bool:
        return all(a in order for a in value) and list(value) == sorted(set(value), key=order.index)

    return Rule(holds, "different stages in the order " + ", ".join(order))


def not_empty() -> Rule:
    return Rule(lambda value: len(value) > 0, "something that is not empty")


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """ "(1x1),(1x2)" as (rows, columns) pairs, in order; "(1x1),...,(6x6)" holds every grid between the two.

    Raises:
      ValueError: the text is not of this form.
    """
    grids: list[tuple[int, int]] = []
    span = False
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "..." and grids and not span:
            span = True
            continue
        match = re.fullmatch(r"\(([1-9]\d?)x([1-9]\d?)\)", part)
        if match is None:
            raise ValueError(f"{part!r} is no grid")
        rows, columns = int(match[1]), int(match[2])
        if span:
            first_row, first_column = grids.pop()
            grids += [(r, c) for r in range(first_row, rows + 1) for c in range(first_column, columns + 1)]
        else:
            grids.append((rows, columns))
        span = False
    if span:
        raise ValueError("'...' needs a grid after it")
    return tuple(grids)


def is_grids(text: str) -> bool:
    try:
        parse_grids(text)
    except ValueError:
        return False
    return True


def is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


MESH_SIZE = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for all devices that are left")
PATTERNS = Rule(
    lambda value: len(value) > 0 and all(map(is_pattern, value)), "one or more regular expressions of paths"
)
RATES = Rule(
    lambda value: all(is_pattern(pattern) and rate >= 0 for pattern, rate in value),
    "pairs (regular expression of paths, multiplier of at least 0)",
)
WEIGHTS = Rule(
    lambda value: not value or (all(w >= 0 for _, w in value) and any(w > 0 for _, w in value)),
    "pairs (scene, whole weight of at least 0), not all of them 0",
)
PACKINGS = Rule(lambda value: value in (1, 2, 4), "1, 2 or 4")
GRIDS = Rule(is_grids, "grids of tiles, rows x columns, such as '(1x2),(2x1)' or '(1x1),...,(6x6)'")
CHANNELS = Rule(lambda value: len(value) == 3, "three numbers, one per RGB channel")
DEVIATIONS = Rule(lambda value: len(value) == 3 and min(value) > 0, "three numbers above 0, one per RGB channel")
HOPS = Rule(lambda value: len(value) > 0 and min(value) >= 1, "one or more whole numbers of at least 1")
SEED = Rule(lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")

_TRAIN = {
    "steps": Field(1000, "optimizer steps", at_least(1)),
    "objective": Field("answer", "training objective", one_of("answer", "base", "policy")),
    "batch_size": Field(0, "rows per optimizer step over all devices; 0 inherits data.batch_size", at_least(0)),
    "learning_rate": Field(1e-3, "peak of the schedule", above(0)),
    "schedule": Field("cosine", "from the peak to the end", one_of("cosine", "linear", "constant")),
    "warmup_fraction": Field(0.03, "of the steps, from 0 up to the peak", within(0, 1)),
    "end_fraction": Field(0.0, "of the peak, at the last step", within(0, 1)),
    "b1": Field(0.9, "Adam's decay of the mean", below_one()),
    "b2": Field(0.999, "Adam's decay of the variance", below_one()),
    "weight_decay": Field(0.0, "decoupled", at_least(0)),
    "clip_norm": Field(1.0, "gradients are scaled down to this global norm", above(0)),
    "trainable": Field((".*",), "patterns from the start of parameter paths; the rest is frozen", PATTERNS),
    "group_rates": Field(
        (), "(pattern, multiplier of the learning rate), first match counts", RATES, element=(str, float)
    ),
    "budgets": Field("full", "of each step: full, or drawn from these", one_of("full", "viable", "subsets")),
    "init_from": Field("", "a stage, or a path to another run's stage folder; empty: random weights"),
    "hops": Field((1, 2, 3), "objective base: length of chains to follow with 1, 2, ... slots on", HOPS, element=int),
    "label_balance": Field(
        0.0, "objective policy: 0 labels as they are, 1 rare budgets like common ones, above that more", within(0, 4)
    ),
    "label_caution": Field(
        1.0, "objective policy: how much more labels above the cheapest budget weigh than its own", above(0)
    ),
    "remat": Field(False, "recompute activations in the backward pass: less memory, more time"),
    "checkpoint_every": Field(500, "steps", at_least(1)),
    "keep": Field(2, "checkpoints of a stage that stay on disk", at_least(1)),
    "max_bad_steps": Field(10, "steps in a row with NaN or Inf before the run stops", at_least(1)),
    "hang_seconds": Field(1800.0, "without a step until the watchdog aborts the process; 0: never", at_least(0)),
}

_MODEL = {
    "plan": Field("visor", "super-blocks with optional self-attention, or every layer dense", one_of("visor", "dense")),
    "pattern": Field(
        tuple(kind.value for kind in most.PATTERN),
        "kinds of the layers of a super-block, in order: 'text', 'cross', 'self'; every 'self' is an optional slot",
    ),
    "head_layers": Field(0, "text-only layers before the first super-block", within(0, most.MAX_LAYERS)),
    "dtype": Field("float32", "of activations", one_of("float32", "bfloat16")),
    "bidirectional_vision": Field(False, "visual tokens see each other both ways"),
    "text.vocab_size": Field(
        0, "rows of the embedding; 0: as many as the tokenizer needs", within(0, most.MAX_VOCABULARY)
    ),
    "text.hidden_size": Field(64, "", within(1, most.MAX_WIDTH)),
    "text.intermediate_size": Field(192, "", within(1, most.MAX_VOCABULARY)),
    "text.num_layers": Field(
        9, "in super-blocks of model.pattern; those left over at the end are text-only", within(1, most.MAX_LAYERS)
    ),
    "text.num_heads": Field(4, "", within(1, most.MAX_HEADS)),
    "text.num_kv_heads": Field(4, "", within(1, most.MAX_HEADS)),
    "text.head_dim": Field(16, "", within(2, most.MAX_HEAD_DIM)),
    "text.rope_theta": Field(1e6, "", above(0)),
    "text.rms_norm_eps": Field(1e-6, "", above(0)),
    "text.tie_word_embeddings": Field(False, ""),
    "text.embedding_init": Field(0.02, "standard deviation of random token embeddings", above(0)),
    "text.residual_init": Field(1.0, "gain of the projections that end a residual branch, when random", above(0)),
    "text.norm_init": Field(1.0, "scale of the final norm, when random", above(0)),
    "text.recency_init": Field(
        0.0, "logit by which random text-only attention begins preferring the nearest", at_least(0)
    ),
    "text.max_positions": Field(
        0,
        "text tokens and visual positions of the longest prompt with its answer; 0: by the rows of training and the"
        " largest picture (config.default_max_positions)",
        within(0, most.MAX_VOCABULARY),
    ),
    "vision.tile_size": Field(72, "pixels a side", within(1, most.MAX_TILE)),
    "vision.patch_size": Field(8, "pixels a side", within(1, most.MAX_TILE)),
    "vision.hidden_size": Field(96, "", within(1, most.MAX_WIDTH)),
    "vision.intermediate_size": Field(192, "", within(1, most.MAX_VOCABULARY)),
    "vision.num_layers": Field(1, "encoder layers that are run", within(1, most.MAX_LAYERS)),
    "vision.num_heads": Field(4, "", within(1, most.MAX_HEADS)),
    "vision.layer_norm_eps": Field(1e-6, "", above(0)),
    "vision.patch_local": Field(False, "no attention in the tower: no patch sees another"),
    "anyres.pinpoints": Field("", "grids of tiles a picture may be cut into; empty: one stretched tile", GRIDS),
    "anyres.max_tiles": Field(9, "cap on a picture's visual tokens, in tiles' worth", at_least(1)),
    "anyres.packing": Field(1, "neighboring features in one visual token: 1, 2 (1 x 2) or 4 (2 x 2)", PACKINGS),
    "anyres.image_mean": Field((0.5, 0.5, 0.5), "of values in [0, 1]", CHANNELS, element=float),
    "anyres.image_std": Field((0.5, 0.5, 0.5), "of values in [0, 1]", DEVIATIONS, element=float),
    "cross.num_kv_heads": Field(0, "of cross-attention; 0: as the decoder's own layers", within(0, most.MAX_HEADS)),
    "cross.init": Field("copy", "how cross-attention starts (model/cross_init.py)", one_of("copy", "zero", "match")),
    "cross.gate_init": Field(1.0, "before tanh, with init='copy'"),
    "cross.kernel_size": Field(7, "of the conditional position's convolution", within(1, most.MAX_KERNEL)),
    "policy.hidden_size": Field(128, "of the routing MLP", within(1, most.MAX_WIDTH)),
    "policy.max_budgets": Field(
        32, "outputs of the routing MLP: most budgets that can be viable", within(1, most.MAX_WIDTH)
    ),
}

_DATA = {
    "source": Field(BUILT_IN[0], "a name from the table in visor_jax/data/sources", not_empty()),
    "root": Field("", "source llava: folder under which pictures and the JSON file lie"),
    "path": Field("", "source llava: the JSON or JSON-lines file below data.root; {split} stands for a split"),
    "test_fraction": Field(0.1, "source llava: of the records, for each of validation and test", within(0, 0.45)),
    "scenes": Field((), "generated data: (scene, whole weight) pairs; empty: all alike", WEIGHTS, element=(str, int)),
    "turns_per_picture": Field(4, "questions in one conversation", at_least(1)),
    "batch_size": Field(32, "conversations a step, over all devices", at_least(1)),
    "tiles": Field(1, "row shape: tiles per row of a batch", at_least(1)),
    "visual_length": Field(128, "row shape: visual positions per row of a batch", at_least(1)),
    "text_length": Field(128, "row shape: text tokens per row of a batch", at_least(1)),
    "follow_links": Field(False, "source llava: links below data.root may lead out of it"),
    "max_image_pixels": Field(
        DEFAULT_MAX_PIXELS,
        "largest picture in pixels; larger ones are skipped, not decoded",
        within(1, PILLOW_MAX_PIXELS),
    ),
    "max_skipped_fraction": Field(0.05, "of the samples tried; past it training stops", within(0, 1)),
}

_REST = {
    "tokenizer.path": Field(BUILT_IN[0], "a built-in tokenizer's name, or the path of a tokenizer.json", not_empty()),
    "tokenizer.system": Field("", "text of the system turn; empty: none"),
    "loss.targets": Field(
        "answer", "the answer and its end, or what LLaVA's code trains on", one_of("answer", "llava")
    ),
    "mesh.replica": Field(1, "copies of the parameters", MESH_SIZE),
    "mesh.fsdp": Field(-1, "devices that share the parameters", MESH_SIZE),
    "mesh.tensor": Field(1, "devices that share each matrix product", MESH_SIZE),
    "search.samples": Field(1024, "of the validation split", at_least(1)),
    "search.max_subsets": Field(512, "evaluate all subsets up to this many, else best-first by count", at_least(2)),
    "label.samples": Field(4096, "of the training split", at_least(1)),
    "label.tolerance": Field(0.01, "share of the full budget's score that a cheaper one may lose", below_one()),
    "label.only_right": Field(False, "leave out questions that the full budget does not answer exactly"),
    "evaluate.samples": Field(1024, "of the test split", at_least(1)),
    "evaluate.batch_size": Field(64, "rows", at_least(1)),
    "evaluate.dials": Field(
        (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
        "positions of the cost/accuracy dial to evaluate",
        not_empty(),
        element=float,
    ),
    "export.license": Field(
        "",
        "of the weights, as the Hugging Face hub spells it; empty: the base model's, or apache-2.0 without one",
        Rule(lambda value: value in ("", *LICENSES), "a license as the hub spells it, such as 'apache-2.0' or 'other'"),
    ),
    "export.base_model": Field("", "id on the hub of the model that the weights come from; empty: as imported"),
    "export.languages": Field(("en",), "two-letter codes of the languages that the model was trained on", not_empty()),
}

# What the method prescribes for each trained stage, where it differs from `train`.
_ALL_BUT_ROUTING = ("(?!routing/)",)
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "base": {
        "objective": "base",
        "budgets": "subsets",
        "trainable": ("vision/", "connector/", "image_newline", "embed_tokens/", "blocks/(text|cross|self)/"),
    },
    "dense": {"init_from": "base", "trainable": _ALL_BUT_ROUTING},
    "warmup": {"init_from": "base", "trainable": ("blocks/cross_attention/",)},
    "full": {"init_from": "warmup", "trainable": _ALL_BUT_ROUTING},
    "universal": {"init_from": "full", "trainable": _ALL_BUT_ROUTING, "budgets": "viable"},
    "policy": {"init_from": "universal", "trainable": ("routing/",), "objective": "policy"},
}

SCHEMA: dict[str, Field] = {
    "name": Field("visor", "of the run, for people"),
    "seed": Field(0, "of weights, data order and drawn budgets", SEED),
    "stage": Field("", "the stage that `train` runs", one_of("", *STAGES)),
    "stages": Field(
        ("base", "warmup", "full", "search", "universal", "label", "policy"),
        "the stages that `run` runs",
        some_of(STAGES),
    ),
    **{f"model.{name}": field for name, field in _MODEL.items()},
    **{f"data.{name}": field for name, field in _DATA.items()},
    **{f"train.{name}": field for name, field in _TRAIN.items()},
    **_REST,
}


def field_of(name: str) -> Field | None:
    """The field called `name`, also where it is a stage's override of a field of `train`; None if there is none."""
    parts = name.split(".")
    if parts[0] == "stage_overrides" and len(parts) == 3 and parts[1] in TRAINED_STAGES:
        return SCHEMA.get(f"train.{parts[2]}")
    return SCHEMA.get(name)


def all_names() -> list[str]:
    """Every name that `field_of` knows."""
    return [*SCHEMA, *(f"stage_overrides.{stage}.{name}" for stage in TRAINED_STAGES for name in _TRAIN)]


def typed(value: Any, field: Field) -> Any:
    """`value` as the field's type: whole numbers become floats where floats are meant, lists become tuples.

    Raises:
      ValueError: the value has another type, is not finite, or breaks the field's rule; it says what is expected.
    """
    if isinstance(field.default, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of {_type_name(field.element)}")
        result: Any = tuple(_element(item, field.element) for item in value)
    else:
        result = _scalar(value, type(field.default))
    if field.rule is not None and not field.rule.holds(result):
        raise ValueError(f"expected {field.rule.expected}")
    return result


def _element(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(kind, tuple):
        return _scalar(value, kind)
    if not isinstance(value, list | tuple) or len(value) != len(kind):
        raise ValueError(f"expected a list of {_type_name(kind)}")
    return tuple(_scalar(item, part) for item, part in zip(value, kind, strict=True))


def _scalar(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {_type_name(kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _type_name(kind: type | tuple[type, ...]) -> str:
    if isinstance(kind, tuple):
        return "pairs (" + ", ".join(_type_name(part) for part in kind) + ")"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
