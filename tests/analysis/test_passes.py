"""Passes of changed models, against NumPy and against models that really lack what is taken away."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.analysis import references
from tests.analysis.conftest import ARCH, Case
from visor_jax.model.likelihood import answer_tokens

ROWS, LAYERS = range(3), range(4)


def scored(case: Case, arrays: dict[str, np.ndarray]) -> tuple[list[bool], np.ndarray]:
    """Returns which answers are right, and their mean log-likelihood per token, by the model's own scoring."""
    losses, correct, weights = map(np.asarray, answer_tokens(case.params, case.visual, arrays, (), ARCH))
    right = np.all(correct | (weights == 0), axis=1)
    return right.tolist(), -losses.sum(axis=1) / weights.sum(axis=1)


def test_nothing_taken_away_changes_nothing(case: Case) -> None:
    right, likelihood = scored(case, case.arrays)
    effect = case.probe.effect()
    assert effect.right.tolist() == right
    np.testing.assert_allclose(effect.log_likelihood, likelihood, rtol=1e-5)
    for divergence in (effect.divergence, effect.first_divergence):
        np.testing.assert_allclose(divergence, 0, atol=1e-6)


def test_without_vision_in_all_layers_the_model_answers_as_without_a_picture(case: Case) -> None:
    blind = {**case.arrays, "visual_segments": jnp.zeros_like(case.arrays["visual_segments"])}
    right, likelihood = scored(case, blind)
    effect = case.probe.effect(dropped=LAYERS)
    assert effect.right.tolist() == right
    np.testing.assert_allclose(effect.log_likelihood, likelihood, rtol=1e-5)
    assert np.all(effect.divergence[:2] > 1e-4) and effect.divergence[2] < 1e-6, "the third sample has no picture"


@settings(max_examples=8)
@given(st.sets(st.sampled_from(LAYERS)), st.sets(st.sampled_from(LAYERS)))
def test_any_layers_may_lose_vision_or_keep_v(case: Case, dropped: set[int], frozen: set[int]) -> None:
    effect = case.probe.effect(dropped, frozen)
    for row in ROWS:
        whole = references.run(case, row)
        changed = references.run(case, row, dropped=tuple(dropped), frozen=tuple(frozen))
        labels = references.labels(case, row)
        of_labels = changed.log_probs[np.arange(len(labels)), labels]
        assert effect.log_likelihood[row] == pytest.approx(of_labels.mean(), rel=1e-4)
        assert effect.right[row] == np.array_equal(changed.log_probs.argmax(axis=1), labels)
        divergences = np.sum(np.exp(changed.log_probs) * (changed.log_probs - whole.log_probs), axis=1)
        assert effect.divergence[row] == pytest.approx(divergences.mean(), rel=1e-3, abs=2e-6)
        assert effect.first_divergence[row] == pytest.approx(divergences[0], rel=1e-3, abs=2e-6)


def test_a_pass_runs_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    first = case.probe.effect(dropped=[1], frozen=[2])
    monkeypatch.setattr(case.probe, "_ablating", None)
    assert case.probe.effect(dropped=(1, 1), frozen={2}) is first
