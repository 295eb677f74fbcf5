"""Objective "policy": weights of labels, and the loss."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.config import architecture, as_config, stage_config
from visor_jax.data.anyres import most_visual_tokens
from visor_jax.data.collate import Content
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective, policy
from visor_jax.train.objectives.by_source import fields_by_source, sources_of_rows
from visor_jax.train.objectives.policy import RARE, LabeledExamples, abstract_policy, balance, policy_loss
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.floats(0, 1))
def test_balance_lifts_what_is_rarer_and_never_by_more_than_rarity_allows(labels: list[int], strength: float) -> None:
    found = np.array(labels)
    weights, counts = balance(found, 4, strength), np.bincount(found, minlength=4)
    assert weights.mean() == pytest.approx(1.0, rel=1e-4)
    by_label = {label: weights[found == label][0] for label in set(labels)}
    for one, other in itertools.product(by_label, repeat=2):
        if counts[one] <= counts[other]:
            assert by_label[one] >= by_label[other] * (1 - 1e-5)
    assert max(by_label.values()) <= min(by_label.values()) * (1 + 1 / RARE) ** strength * (1 + 1e-5)


def test_budgets_of_more_than_an_even_share_weigh_alike() -> None:
    weights = balance(np.repeat([0, 1, 3], [60, 50, 10]), 4, 2.4)
    assert weights[0] == weights[60] and weights[-1] > 5 * weights[0]


def test_labels_weigh_as_label_balance_says(tiny_run: Path) -> None:
    for strength in (0.0, 1.0):
        config = tiny_config({"stage_overrides.policy.label_balance": strength})
        steps = list(make_objective(config, "policy", Workdir(tiny_run)).steps(0, 4))
        labels = np.concatenate([step.arrays["label"] for step in steps])
        weights = np.concatenate([step.arrays["label_weight"] for step in steps])
        assert all(len(set(weights[labels == label].tolist())) == 1 for label in set(labels.tolist()))
        if strength == 0.0:
            assert (weights == 1).all()


def test_rows_have_room_for_the_largest_labeled_question(tiny_run: Path) -> None:
    config, labels = as_config(tiny_config({"data.visual_length": 1000})), Labels.read(Workdir(tiny_run))
    assert labels.num_visual is not None and 0 < labels.num_visual.max() <= 128
    batch = LabeledExamples(config, labels).batch(np.arange(4))[1]
    assert batch.arrays["visual_segments"].shape == (4, 128)
    assert (batch.arrays["visual_segments"] > 0).sum(axis=1).tolist() == labels.num_visual[:4].tolist()
    earlier = dataclasses.replace(labels, num_visual=None)
    assert LabeledExamples(config, earlier).row_shape.visual == 1000, "of an earlier version"
    other = dataclasses.replace(labels, num_visual=labels.num_visual + 1)
    with pytest.raises(RequestError, match="labels were made of other data"):
        LabeledExamples(config, other).batch(np.arange(1))


def test_planned_rows_hold_one_question_about_the_largest_picture() -> None:
    config = as_config(tiny_config({"data.visual_length": 1000}))
    num_rows = stage_config(config, "policy").batch_size
    shape = abstract_policy(config, "policy")[1]["visual_segments"].shape
    most = most_visual_tokens(architecture(config, "policy"))
    assert shape[0] == num_rows and most <= shape[1] < min(1000, most + 128)


def test_labels_count_by_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = jnp.array([[2.0, 0.0, -jnp.inf], [0.0, 1.0, -jnp.inf]])
    monkeypatch.setattr(policy, "encode", lambda *_: jnp.zeros(()))
    monkeypatch.setattr(policy, "route", lambda *_: scores)
    arch = testing.tiny_architecture()

    def loss_of(weights: list[float]) -> float:
        batch = {"label": jnp.array([0, 0]), "label_weight": jnp.array(weights)}
        loss, metrics = policy_loss({}, batch, jnp.array([True]), arch, num_viable=2)
        assert float(metrics["agreement"]) == 0.5
        return float(loss)

    first, second = np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0))
    assert loss_of([1.0, 1.0]) == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss_of([3.0, 1.0]) == pytest.approx((3 * first + second) / 4, rel=1e-5)
    assert loss_of([1.0, 0.0]) == pytest.approx(first, rel=1e-5)


def test_the_loss_of_each_source_is_weighted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr(policy, "encode", lambda *_: jnp.zeros(()))
    monkeypatch.setattr(policy, "route", lambda *_: scores)
    contents = [[Content(name, 1, 4, 4)] for name in ("pages", "charts", "pages")]
    names = ["charts", "pages", "empty"]
    batch = {"label": jnp.array([0, 0, 0]), "label_weight": jnp.array([1.0, 2.0, 3.0])}
    batch |= {name: jnp.asarray(x) for name, x in sources_of_rows(contents, names).items()}
    arch = testing.tiny_architecture()
    loss, metrics = policy_loss({}, batch, jnp.array([True]), arch, num_viable=2, num_sources=3)
    first, second, third = np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0)), np.log(2.0)
    fields = fields_by_source(names, jax.device_get(metrics))
    assert fields == {
        "loss/source=charts": pytest.approx(second, rel=1e-5),
        "loss/source=pages": pytest.approx((first + 3 * third) / 4, rel=1e-5),
    }
    assert float(loss) == pytest.approx((first + 2 * second + 3 * third) / 6, rel=1e-5)
    assert sources_of_rows(contents[:1], ["pages"]) == {}, "one source: its loss is that of the step"
