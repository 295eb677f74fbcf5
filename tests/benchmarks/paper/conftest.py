"""Lets these tests import the entries of benchmarks/paper/."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest


@pytest.fixture
def paper(script: Callable[[str], types.ModuleType]) -> Callable[[str], types.ModuleType]:
    """Returns a module of benchmarks/paper by its name."""
    return lambda name: script(f"paper.{name}")
