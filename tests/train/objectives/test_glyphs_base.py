"""Objective "base": its labeled grids, its losses, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.config import architecture
from visor_jax.data.collate import encode_example
from visor_jax.data.from_config import make_tokenizer
from visor_jax.data.glyphs import render as glyphs_render
from visor_jax.data.glyphs.kind import glyphs_source
from visor_jax.data.glyphs.source import TASKS
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import glyphs_base as objectives
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.glyphs_base import (
    WORDS_AFTER,
    masked_mean,
    name_tables,
    reading_arrays,
    relation_loss,
    relation_scores,
)
from visor_jax.workdir.folder import Workdir

# The tiny configuration with the data set `glyphs` and its objective.
GLYPHS = {
    "data.source": "glyphs", "tokenizer.path": "glyphs", "model.vision.tile_size": 48, "model.vision.patch_size": 8,
    "model.vision.patch_local": True, "stage_overrides.base.objective": "base",
    "stage_overrides.base.budgets": "subsets",
}  # fmt: skip


def test_base_refuses_data_and_patches_it_has_no_labels_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="patch_size=4: stage base needs 8"):
        make_objective(
            tiny_config({**GLYPHS, "model.vision.patch_size": 4, "data.visual_length": 145}), "base", Workdir(tmp_path)
        )


def test_words_stand_around_the_picture_of_a_base_grid(tmp_path: Path) -> None:
    step = next(iter(make_objective(tiny_config(GLYPHS), "base", Workdir(tmp_path)).steps(0, 1)))
    arrays = step.arrays
    order = np.sort(np.concatenate([arrays["visual_positions"], arrays["text_positions"]], axis=1), axis=1)
    assert (order == np.arange(order.shape[1])).all(), "every place in the sequence is taken once"
    after = arrays["text_tokens"][:, -WORDS_AFTER:]
    assert len(np.unique(after)) > WORDS_AFTER, "words differ from row to row"
    assert (arrays["text_positions"][:, -WORDS_AFTER:] > arrays["visual_positions"].max()).all()


def test_what_a_question_asks_about_stands_where_its_answer_begins(tmp_path: Path) -> None:
    """Each question's last name, however it is worded; nothing at other tokens or of questions without a name."""
    config, tokenizer = tiny_config(GLYPHS), make_tokenizer(tiny_config(GLYPHS))
    names = name_tables(tokenizer)["asked"]
    words = [*glyphs_render.LETTERS, *glyphs_render.COLORS]
    sources = {task: glyphs_source(config, "train", tasks=(task,), turns_per_picture=2) for task in TASKS}
    for task, source in sources.items():
        example = encode_example(source[3], tokenizer, architecture(config))
        arrays = reading_arrays(example, names, len(example.text_tokens) + 3)
        assert all(len(array) == len(example.text_tokens) + 3 for array in arrays.values())
        starts = [place for place in np.flatnonzero(example.turn_index >= 0) if example.turn_index[place - 1] < 0]
        for place, turn in zip(starts, source[3].turns, strict=True):
            said = [word for word in re.findall(r"[A-Za-z]+", turn.question) if word in words]
            expected = 1 + words.index(said[-1]) if said else 0
            assert arrays["asked"][place - 1] == expected, (task, turn.question)
            assert bool(said) == (task not in ("bg", "digit", "shape")), turn.question
        others = np.setdiff1d(np.arange(len(arrays["asked"])), np.array(starts) - 1)
        assert not arrays["asked"][others].any()
        cut = reading_arrays(example, names, 5)
        assert all((cut[name] == arrays[name][:5]).all() and len(cut[name]) == 5 for name in arrays)


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


def test_a_relation_uses_the_names_only_in_patches_that_may_use_them() -> None:
    table = jnp.array(np.random.default_rng(0).normal(size=(6, 64)), jnp.float32)
    names = jnp.array([[0, 1, 2], [3, 4, 5]])  # two written forms of three names
    features = jnp.tile(table[1] + table[4], (1, 2, 1))  # the second name, twice; only the first patch uses names
    scores = relation_scores(features, "above", names, table, jnp.array([[1.0, 0.0]]))
    silent = relation_scores(jnp.zeros_like(features), "above", names, table, jnp.ones((1, 2)))
    assert scores.shape == (1, 2, 4) and not silent.any()
    difference = scores[0, 0] - scores[0, 1]
    assert float(difference[0]) == 0.0, '"nothing" has no name'
    assert int(jnp.argmax(difference)) == 2, "class 1 + index of the name"


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
