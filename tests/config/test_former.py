"""Configurations of earlier versions: fields that are gone are left out where they had no effect, else refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from visor_jax.config import from_dict, to_json
from visor_jax.config.former import FORMER, is_former, without_former
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config


def saved(**fields: Any) -> dict[str, Any]:
    """Returns the tiny configuration as a workdir of an earlier version keeps it, with {dotted name: value} added."""
    tree = ConfigDict(json.loads(to_json(tiny_config({"stages": ("full",)}))))
    tree.update_from_flattened_dict(fields)
    return tree.to_dict()


def test_fields_without_effect_are_left_out() -> None:
    for name, values in FORMER.items():
        for value in values:
            old = saved(**{name: list(value) if isinstance(value, tuple) else value})
            assert without_former(old) == saved(), (name, value)
    old = saved(**{"stage_overrides.policy.label_caution": 1.0, "model.text.attention_init": "copying"})
    assert from_dict(old) == from_dict(saved())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.label_caution", 1.25),
        ("stage_overrides.full.hops", [1, 3, 3]),
        ("data.scenes", [["a", 1]]),
        ("model.vision.patch_local", True),
    ],
)
def test_fields_with_an_effect_are_refused(name: str, value: Any) -> None:
    assert not is_former(name, value)
    with pytest.raises(RequestError, match=rf"{name.rpartition('.')[2]}.*unknown field"):
        from_dict(saved(**{name: value}))


def test_the_former_defaults_of_an_untrained_base_are_left_out() -> None:
    base = {"init_from": "", "objective": "base", "budgets": "subsets", "trainable": ["vision/"]}
    old = saved(**{"stage_overrides.base": base})
    assert from_dict(old) == from_dict(saved())
    with pytest.raises(RequestError, match=r"stage_overrides\.base\.objective='base': expected one of"):
        from_dict({**old, "stages": ["base", "warmup"]})
