"""A tiny dense model with one batch of questions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.analysis.api import LAYER_ANALYSES
from visor_jax.analysis.base import LayerTable
from visor_jax.analysis.passes import Answers, Probe, answers_of
from visor_jax.model.visor import encode
from visor_jax.scale.compiler_options import QUICK

ARCH = testing.tiny_architecture(4, plan="dense")
OBSERVERS = {name: observer for analysis in LAYER_ANALYSES for name, observer in analysis.observers.items()}


class Case(NamedTuple):
    """Parameters, a batch of two samples with pictures and one without, its V(0), its answers, and a probe of it."""

    params: Any
    arrays: dict[str, Any]
    visual: Any
    answers: Answers
    probe: Probe


@pytest.fixture(scope="session")
def case() -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=dict(QUICK)))
        params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
        batch = testing.random_batch(ARCH, (((3, 4),), ((2, 2, 3),), ((7,),)))
        arrays = jax.tree.map(jnp.asarray, dict(batch.arrays))
        visual, answers = encode(params, arrays, ARCH), answers_of(batch.arrays)
        return Case(params, arrays, visual, answers, Probe(params, visual, arrays, answers, ARCH, OBSERVERS))


@pytest.fixture
def table() -> Callable[..., LayerTable]:
    """Makes a table of the given columns: task -> value per layer."""

    def make(accuracy: dict[str, float], levels: dict[str, str] | None = None, **measures: Any) -> LayerTable:
        arrays = {name: {task: np.array(x, float) for task, x in column.items()} for name, column in measures.items()}
        num_layers = len(next(iter(next(iter(arrays.values())).values())))
        levels = {task: (levels or {}).get(task, "") for task in accuracy}
        return LayerTable(num_layers, dict.fromkeys(accuracy, 5), levels, accuracy, arrays)

    return make
