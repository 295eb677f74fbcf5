"""Random starts: no key is consumed twice, within a stage's parameters, between stages, or by draws of another kind.

`jax.debug_key_reuse` lets a key pass that is folded into and split as well, so these tests have a generator of their
own: threefry, which also notes down the value of each key and what it was used for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl, threefry_prng_impl

from visor_jax import testing
from visor_jax.architecture import CrossAttentionArchitecture
from visor_jax.config import architecture, as_config
from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.generate.sampling import Sampling, select
from visor_jax.hf.model import add_visor_params
from visor_jax.model.keys import start_key
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale.mesh import build_mesh, configured_mesh
from visor_jax.scale.sharding import param_shardings
from visor_jax.testing import tiny_config
from visor_jax.train.state import start_params
from visor_jax.workdir.folder import Workdir

Use = tuple[str, tuple[int, ...], int]  # "bits", "split" or "fold_in", the key, the number folded in


class Uses:
    """Uses of every key since the last `clear`."""

    def __init__(self) -> None:
        self._found: list[Use] = []
        plain = threefry_prng_impl

        def note(use: str, key: np.ndarray, number: Any = 0) -> None:
            self._found.append((use, tuple(np.asarray(key).tolist()), int(number)))

        def noted(use: str, function: Callable) -> Callable:
            def call(key: jax.Array, *arguments: Any) -> jax.Array:
                number = arguments[0] if use == "fold_in" else 0
                jax.debug.callback(partial(note, use), key, number)
                return function(key, *arguments)

            return call

        self.impl = define_prng_impl(
            key_shape=(2,),
            seed=plain.seed,
            split=noted("split", plain.split),
            random_bits=noted("bits", plain.random_bits),
            fold_in=noted("fold_in", plain.fold_in),
            name="noted",
        )

    def all(self) -> list[Use]:
        jax.effects_barrier()
        return self._found

    def again(self) -> list[str]:
        """Every key that is drawn from, split and folded into more than once in all.

        Folding into a key again and again is allowed: the keys that come of it are watched themselves.
        """
        by_key: dict[tuple[int, ...], Counter[str]] = {}
        for use, key, _ in self.all():
            by_key.setdefault(key, Counter())[use] += 1
        return [
            f"{key}: {dict(found)}"
            for key, found in by_key.items()
            if found["bits"] + found["split"] > 1 or len(found) > 1
        ]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    """Keys that are made in the test record their uses."""
    found = Uses()
    monkeypatch.setattr(jax.random, "key", partial(jax.random.key, impl=found.impl))
    return found


def test_reuse_is_noticed(uses: Uses) -> None:
    key = jax.random.key(0)
    jax.random.normal(jax.random.fold_in(key, 1), (2,))
    assert uses.again() == []
    jax.jit(jax.vmap(lambda k: jax.random.normal(k, (2,))))(jax.random.split(key))
    parent, child = sorted(uses.again(), key=lambda found: "bits" in found)
    assert "fold_in" in parent and "split" in parent, "each is valid alone; both derive keys from one key"
    assert "'bits': 2" in child, "and make the same one"


@pytest.mark.parametrize("kind", ["copy", "zero"])
def test_fresh_parameters_consume_no_key_twice(uses: Uses, kind: str) -> None:
    arch = testing.tiny_architecture(4, cross=CrossAttentionArchitecture(num_kv_heads=2, init=kind))
    testing.quick_jit(partial(init_params, arch))(start_key(7, "base"))
    assert len(uses.all()) > 20 and uses.again() == []


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_stages_that_start_one_after_the_other_consume_no_key_twice(uses: Uses, tiny_run: Path) -> None:
    """`base` and `base_words` start at random; `warmup` starts from `base`, and what that lacks starts at random.

    The run has no `base_words` from which `base_lists` and `base_pages` could start.
    """
    config = tiny_config({"model.cross.init": "zero"})
    mesh, started = configured_mesh(config), []
    for stage in (stage for stage in TRAINED_STAGES if stage not in ("base_lists", "base_pages")):
        arch = architecture(config, stage)
        places = param_shardings(abstract_params(arch), mesh)
        fresh = testing.quick_jit(partial(init_params, arch))
        start_params(as_config(config), stage, arch, mesh, Workdir(tiny_run), places, fresh)
        started.append(len(uses.all()))
    assert uses.again() == []
    assert started[0] > 0 and started[-1] > started[0], "at least two stages draw random initial values"


@pytest.mark.usefixtures("quick")
def test_an_imported_model_consumes_no_key_twice(uses: Uses) -> None:
    arch = testing.tiny_architecture(7, cross=CrossAttentionArchitecture(num_kv_heads=2, init="zero"))
    dense = testing.random_params(dataclasses.replace(arch, plan="dense"))
    _, new = add_visor_params(dense, arch, build_mesh(1, 1, 1, devices=jax.devices()[:1]), start_key(0, "base"))
    assert new and uses.all() and uses.again() == []


def test_sampled_tokens_are_drawn_from_keys_of_their_own(uses: Uses) -> None:
    """Also if a question has the seed of the run."""
    for stage in TRAINED_STAGES:
        jax.vmap(lambda key: jax.random.normal(key, (2,)))(jax.random.split(start_key(7, stage), 4))
    for step in range(3):
        select(jnp.zeros((1, 5)), Sampling(1.0, 1.0, 7).draw(), step, 4)
    assert uses.again() == []
