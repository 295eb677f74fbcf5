"""The scripts of `benchmarks/` as modules."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """Imports a script by its name, with the others beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
