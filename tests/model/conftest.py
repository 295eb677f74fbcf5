"""Tests of the model refuse to broadcast an array to more axes where the code does not say so."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def ranks_are_written_out() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield
