"""Fields of earlier versions: what saved configurations and identities say with them, in today's fields.

A workdir keeps its whole configuration. It stays readable if a field that is gone had a value that means nothing today.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# dotted name of the field in its section -> the values that have no effect
FORMER: dict[str, tuple[Any, ...]] = {
    "data.scenes": ((),),
    "model.text.attention_init": ("copying", "random"),  # only for random weights, which a saved run has trained since
    "model.text.norm_init": (1.0,),
    "model.text.recency_init": (0.0,),
    "model.vision.patch_local": (False,),
    "train.hops": ((1, 2, 3),),
    "train.label_caution": (1.0,),
}
_LABELED_BASE = "base"  # the former objective, and default, of the stage base


def is_former(name: str, value: Any) -> bool:
    """Returns whether a dotted name is that of a former field, and its value one that has no effect."""
    parts = name.split(".")
    name = f"train.{parts[2]}" if parts[0] == "stage_overrides" and len(parts) == 3 else name
    plain = tuple(value) if isinstance(value, list) else value
    return plain in FORMER.get(name, ())


def without_former(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration without former fields that have no effect.

    Of a run that does not train the stage base, its former overrides are left out too.
    """
    rest = {name: value for name, value in tree.items() if not is_former(f"{prefix}{name}", value)}
    result = {
        name: without_former(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in rest.items()
    }
    overrides = result.get("stage_overrides")
    if not prefix and isinstance(overrides, dict) and "base" not in (tree.get("stages") or ()):
        base = overrides.get("base")
        if isinstance(base, dict) and base.get("objective") == _LABELED_BASE:
            result["stage_overrides"] = {name: value for name, value in overrides.items() if name != "base"}
    return result
