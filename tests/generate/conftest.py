"""Fixtures of the tests of generation: a tiny untrained model and an encoded picture."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.loading import Visor


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Visor]:
    """Returns a function (plan, **fields of `Visor`) -> a model of one super-block and one more layer."""

    def make(plan: str = "visor", **fields: Any) -> Visor:
        tokenizer = testing.almanac_tokenizer()
        arch = testing.tiny_architecture(4, plan=plan)
        arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, vocab_size=tokenizer.vocab_size))
        viable = [(False,), (True,)] if plan == "visor" else []
        return Visor(testing.random_params(arch), arch, tokenizer, viable, **fields)

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Visor]) -> Visor:
    """A model with a policy and searched budgets."""
    return make_model(has_policy=True, searched=True)


@pytest.fixture(scope="session")
def png() -> bytes:
    """`testing.random_picture(20, 90, seed=0)` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(testing.random_picture(20, 90, seed=0)).save(buffer, format="PNG")
    return buffer.getvalue()
