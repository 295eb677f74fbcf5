"""Losses: what counts as a target, as a right turn, and how much each label weighs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.model.likelihood import answer_tokens, prompt_end
from visor_jax.model.visor import encode
from visor_jax.train.objectives import glyphs_base as objectives
from visor_jax.train.objectives.answers import answer_loss, turn_correct
from visor_jax.train.objectives.base import computed_in
from visor_jax.train.objectives.glyphs_base import masked_mean, relation_loss, relation_scores
from visor_jax.train.objectives.policy import policy_loss


def test_a_turn_is_right_where_all_its_targets_are() -> None:
    correct = jnp.array([[True, False, True, True]])
    turns = jnp.array([[-1, 0, 0, 1, -1]])  # of the tokens; each is predicted from the one before
    assert turn_correct(correct, turns, 3).tolist() == [[False, True, True]], "a turn that a row has not is right"


def test_prompt_end_is_where_the_first_target_stands() -> None:
    batch = {
        "loss_mask": jnp.array([[False, False, True, True], [False] * 4]),
        "text_positions": jnp.array([[0, 1, 40, 41], [0, 0, 0, 0]]),
    }
    assert prompt_end(batch).tolist() == [40, np.iinfo(np.int32).max]


def test_masked_mean_of_nothing_is_zero() -> None:
    assert float(masked_mean(jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0]))) == 3.0
    assert float(masked_mean(jnp.array([2.0, 4.0]), jnp.zeros(2))) == 0.0


def test_patches_with_and_without_a_relation_weigh_half_each() -> None:
    scores = jnp.array([[[5.0, 0.0]] * 10])  # class 0 is "nothing"
    labels = jnp.array([[0] * 9 + [1]])
    loss, accuracy = relation_loss(scores, labels, jnp.ones((1, 10)))
    right, wrong = np.log1p(np.exp(-5.0)), 5 + np.log1p(np.exp(-5.0))
    assert float(loss) == pytest.approx(0.5 * (right + wrong), rel=1e-5)
    assert float(accuracy) == 0.0, "accuracy is that of the patches that have a relation"


def test_a_relation_is_told_in_words_only_by_patches_that_may_speak() -> None:
    table = jnp.array(np.random.default_rng(0).normal(size=(6, 64)), jnp.float32)
    names = jnp.array([[0, 1, 2], [3, 4, 5]])  # two written forms of three names
    features = jnp.tile(table[1] + table[4], (1, 2, 1))  # the second name, twice: one patch speaks, one does not
    scores = relation_scores(features, "above", names, table, jnp.array([[1.0, 0.0]]))
    silent = relation_scores(jnp.zeros_like(features), "above", names, table, jnp.ones((1, 2)))
    assert scores.shape == (1, 2, 4) and not silent.any()
    difference = scores[0, 0] - scores[0, 1]
    assert float(difference[0]) == 0.0, '"nothing" has no name'
    assert int(jnp.argmax(difference)) == 2, "class 1 + index of the name"


def test_labels_count_by_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = jnp.array([[2.0, 0.0, -jnp.inf], [0.0, 1.0, -jnp.inf]])
    monkeypatch.setattr(objectives, "encode", lambda *_: jnp.zeros(()))
    monkeypatch.setattr(objectives, "route", lambda *_: scores)
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


def test_only_targets_weigh_and_none_is_predicted_from_another_sample() -> None:
    arch = testing.tiny_architecture(num_layers=6)
    batch, params = testing.random_batch(arch), testing.random_params(arch)
    budget = jnp.ones(arch.num_slots, bool)

    def run(params, arrays):
        return answer_tokens(params, encode(params, arrays, arch), arrays, budget, arch)

    program = testing.quick_jit(run)
    losses, _, weights = program(params, batch.arrays)
    mask, segments = batch.arrays["loss_mask"], batch.arrays["text_segments"]
    assert np.array_equal(np.asarray(weights) > 0, mask[:, 1:] & (segments[:, 1:] == segments[:, :-1]))
    assert float(weights.sum()) == 8, "two targets of each of the four examples"
    everything = {**batch.arrays, "loss_mask": np.ones_like(mask)}
    _, _, weights = program(params, everything)
    assert not np.asarray(weights)[segments[:, 1:] != segments[:, :-1]].any(), "the first token of a packed sample"
    changed = {**batch.arrays, "text_tokens": np.where(segments == 2, 5, batch.arrays["text_tokens"])}
    other, _, _ = program(params, changed)
    first = segments[:, 1:] == 1
    np.testing.assert_array_equal(np.asarray(losses)[first], np.asarray(other)[first])
    assert jax.tree.leaves(losses)[0].dtype == np.float32


def test_reading_looks_at_words_alone_and_is_learned_where_answers_begin() -> None:
    """The loss falls with gradient descent on the text layers; other tokens' `asked` and padding do not touch it."""
    arch = testing.tiny_architecture(6)
    params = jax.tree.map(jnp.asarray, testing.random_params(arch))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, arch.text.vocab_size, (2, 7))
    batch = {
        "reading_tokens": jnp.array(tokens),
        "reading_positions": jnp.tile(jnp.arange(7), (2, 1)),
        "reading_segments": jnp.array([[1] * 7, [1] * 5 + [0] * 2]),
        "reading_targets": jnp.array([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], bool),
        "asked": jnp.array([[0, 0, 0, 2, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]),
    }
    names = jnp.array([[0, 1, 2], [3, 4, 5]])

    @testing.quick_jit
    def loss_of(blocks, batch):
        loss, metrics = objectives.reading_loss({**params, "blocks": blocks}, batch, arch, names)
        return loss, metrics["asked"]

    @testing.quick_jit
    def descend(blocks):
        gradients = jax.grad(lambda b: objectives.reading_loss({**params, "blocks": b}, batch, arch, names)[0])(blocks)
        return jax.tree.map(lambda x, g: x - 0.05 * g, blocks, gradients)

    start, _ = loss_of(params["blocks"], batch)
    padding = {**batch, "reading_tokens": batch["reading_tokens"].at[1, 5:].set(0)}
    np.testing.assert_allclose(loss_of(params["blocks"], padding)[0], start, rtol=1e-6)
    blocks = params["blocks"]
    for _ in range(60):
        blocks = descend(blocks)
    end, right = loss_of(blocks, batch)
    assert float(end) < 0.5 * float(start) and float(right) == 1.0


def test_in_bfloat16_activations_are_cast_and_gradients_are_those_of_the_float32_parameters() -> None:
    arch = testing.tiny_architecture()
    params, batch = testing.random_params(arch), testing.random_batch(arch).arrays
    on = jnp.ones(arch.num_slots, bool)

    def step(dtype: str):
        loss = computed_in(dtype, partial(answer_loss, arch=arch, num_turns=1, remat=False))
        return testing.quick_jit(lambda p: jax.value_and_grad(lambda q: loss(q, batch, on)[0])(p))

    (exact, _), (rough, gradients) = step("float32")(params), step("bfloat16")(params)
    assert 0 < abs(float(exact) - float(rough)) < 0.02 * float(exact)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    products = [line for line in step("bfloat16").lower(params).as_text().splitlines() if "dot_general" in line]
    half = [line for line in products if "xbf16>, tensor" in line]
    assert len(half) > 2 / 3 * len(products), "all but logits, attention's softmax and their gradients"
