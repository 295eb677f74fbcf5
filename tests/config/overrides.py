"""Overrides of the default configuration, as the command line gives them."""

from __future__ import annotations

import pytest

from visor_jax.config import Config, apply_overrides, default_config
from visor_jax.errors import RequestError


def refused(*overrides: str) -> str:
    """Returns the one-line message with which overrides of the default configuration are refused."""
    with pytest.raises(RequestError) as caught:
        apply_overrides(default_config(), [f"--config.{override}" for override in overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(*overrides: str) -> Config:
    """Returns the checked default configuration with these overrides, such as "train.steps=3"."""
    return apply_overrides(default_config(), [f"--config.{override}" for override in overrides])
