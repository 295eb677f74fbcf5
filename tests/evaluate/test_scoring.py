"""Scoring: one teacher-forced pass gives the same result as generation, and its figures are consistent."""

from __future__ import annotations

import dataclasses
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.budget import Bits, Budget, all_subsets
from visor_jax.config import architecture
from visor_jax.data.questions import single_questions
from visor_jax.data.sample import Sample
from visor_jax.errors import RequestError
from visor_jax.evaluate import prefixes
from visor_jax.evaluate.configured import with_system
from visor_jax.evaluate.scoring import Scores, choices, sample_sizes, score
from visor_jax.evaluate.summary import dense_row, level_means, level_weights, task_accuracies
from visor_jax.evaluate.visual_tokens import encoder, visual_tokens
from visor_jax.loading import Visor, load
from visor_jax.scale.mesh import build_mesh
from visor_jax.testing import questions_of, tiny_config

pytestmark = pytest.mark.usefixtures("quick")
MESH = build_mesh(1, -1, 1)
BUDGETS = all_subsets(2)


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Visor:
    model = load(tiny_run)
    model.searched = False  # any budget may be requested, viable or not
    return model


def with_answer(sample: Sample, answer: str, number: int) -> Sample:
    turn = dataclasses.replace(sample.turns[0], answer=answer)
    return dataclasses.replace(sample, id=f"{number}", turns=(turn,))


def answer_text(model: Visor, sample: Sample, bits: tuple[bool, ...]) -> str:
    return model.answer(list(sample.images), sample.turns[0].question, Budget.of(bits), max_new_tokens=8).text


def test_teacher_forced_scores_equal_generation(model: Visor) -> None:
    """For every budget; some references are answers of the model under one of the budgets."""
    chosen = list(single_questions(tiny_config(), "validation", 3))
    answers = {(i, bits): answer_text(model, sample, bits) for i, sample in enumerate(chosen) for bits in BUDGETS}
    samples = [
        with_answer(sample, answer, 10 * i + k)
        for i, sample in enumerate(chosen)
        for k, answer in enumerate(
            sorted({sample.turns[0].answer, *(a for (j, _), a in answers.items() if j == i and a.strip())})
        )
    ]
    scores = score(model.params, questions_of(tiny_config(), samples).batches(4), BUDGETS, model.arch, mesh=MESH)
    assert scores.ids == [f"{number}/0" for number in range(len(samples))]
    for row, bits in enumerate(scores.budgets):
        for column, sample in enumerate(samples):
            same = answers[int(sample.id) // 10, bits] == sample.turns[0].answer.strip()
            assert scores.correct[row, column] == same, (bits, sample.turns[0])
    assert not scores.correct.all()


def test_log_likelihood_is_that_of_the_logits(model: Visor) -> None:
    sample = next(iter(single_questions(tiny_config(), "validation", 1)))
    (batch,) = questions_of(tiny_config(), [sample]).batches(1)
    actual = score(model.params, [batch], BUDGETS, model.arch, mesh=MESH).log_likelihood[:, 0]
    tokens = model.tokenizer.encode(sample.turns[0].answer)
    arrays = batch.arrays
    used = arrays["text_segments"][0] > 0
    ids = arrays["text_tokens"][0][used].tolist()
    targets = np.flatnonzero(arrays["loss_mask"][0][used])
    place = int(arrays["visual_positions"][0].min())  # text before the picture
    with_picture = [*ids[:place], model.tokenizer.image_token_id, *ids[place:]]
    assert len(targets) >= len(tokens)
    for row, bits in enumerate(BUDGETS):
        logits = model.logits(with_picture, list(sample.images), Budget.of(bits))
        log_probabilities = np.asarray(jax.nn.log_softmax(logits))
        expected = sum(log_probabilities[i - 1, ids[i]] for i in targets)
        assert actual[row] == pytest.approx(expected, abs=1e-4)


def test_routes_and_sizes_are_those_of_the_prompt(model: Visor) -> None:
    samples = list(single_questions(tiny_config(), "validation", 3))
    batches = questions_of(tiny_config(), samples).batches(2)
    scores = score(model.params, batches, model.viable_budgets, model.arch, mesh=MESH, routed=True)
    assert scores.routes is not None and scores.routes.shape == (3, len(model.viable_budgets))
    for row, sample in enumerate(samples):
        route = model.route(list(sample.images), sample.turns[0].question)
        np.testing.assert_allclose(np.asarray(jax.nn.softmax(scores.routes[row])), route, atol=1e-5)
        prompt = model._prompt(list(sample.images), sample.turns[0].question)
        sizes = scores.num_visual[row], scores.num_prompt[row], scores.num_tiles[row]
        assert sizes == (prompt.size.visual, prompt.size.text, prompt.size.tiles)


def test_white_space_around_a_reference_does_not_count(model: Visor) -> None:
    sample = next(iter(single_questions(tiny_config(), "validation", 1)))
    answer = sample.turns[0].answer
    written = [with_answer(sample, text, n) for n, text in enumerate([answer, f"{answer}\n", f" {answer} \r\n"])]
    scores = score(model.params, questions_of(tiny_config(), written).batches(4), BUDGETS, model.arch, mesh=MESH)
    assert (scores.log_likelihood == scores.log_likelihood[:, :1]).all() and scores.log_likelihood.any()
    assert (scores.correct == scores.correct[:, :1]).all()


def test_samples_without_a_picture_are_scored_as_they_are_answered(model: Visor) -> None:
    """In one batch with a sample that has a picture; with its own system text."""
    pictured = next(iter(single_questions(tiny_config(), "validation", 1)))
    bare = dataclasses.replace(pictured, images=(), system="Be terse.")
    prompted, budgets = with_system(model, bare.system), [BUDGETS[0], BUDGETS[-1]]
    question = bare.turns[0].question
    answers = [prompted.answer([], question, Budget.of(bits), max_new_tokens=6).text.strip() for bits in budgets]
    samples = [with_answer(bare, text, n) for n, text in enumerate(sorted({*answers, "never"} - {""}))]
    actual = score(
        model.params, questions_of(tiny_config(), [*samples, pictured]).batches(4), budgets, model.arch, mesh=MESH
    )
    assert actual.num_tiles.tolist() == [0] * len(samples) + [1] and actual.num_visual[0] == 0 < actual.num_visual[-1]
    for column, sample in enumerate(samples):
        assert actual.correct[:, column].tolist() == [answer == sample.turns[0].answer for answer in answers]


def test_a_black_picture_has_a_tile(model: Visor) -> None:
    sample = next(iter(single_questions(tiny_config(), "validation", 1)))
    black = dataclasses.replace(sample, images=(np.zeros_like(sample.images[0]),))
    scores = score(model.params, questions_of(tiny_config(), [black]).batches(2), BUDGETS[:1], model.arch, mesh=MESH)
    assert scores.num_tiles.tolist() == [1]


def test_nothing_usable_is_a_wrong_request(model: Visor) -> None:
    samples = list(single_questions(tiny_config(), "validation", 2))
    with pytest.raises(RequestError, match="no usable question"):
        short = questions_of(tiny_config({"data.text_length": 2}), samples)
        score(model.params, short.batches(2), BUDGETS, model.arch, mesh=MESH)


def test_a_second_pass_compiles_nothing(model: Visor, caplog: pytest.LogCaptureFixture) -> None:
    """Programs are reused for other subsets, in any number, and for other questions of the same lengths."""
    chosen = list(single_questions(tiny_config(), "validation", 6))

    def compiled(samples: list[Sample], budgets: list[Bits]) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            score(model.params, questions_of(tiny_config(), samples).batches(4), budgets, model.arch, mesh=MESH)
        return [record.message for record in caplog.records if "ompil" in record.message]

    encoder.cache_clear()
    prefixes.programs.cache_clear()
    assert compiled(chosen, BUDGETS[:2]), "the first pass compiles, and `compiled` reports it"
    assert compiled(chosen[::-1], BUDGETS[2:]) == []
    assert compiled(chosen, BUDGETS[:1]) == compiled(chosen, BUDGETS[:3]) == [], "as in a best-first search"


def test_pictures_are_looked_at_once_and_not_once_a_budget(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def counted(*args: Any) -> jax.Array:
        encoded.append(1)
        return visual_tokens(*args)

    monkeypatch.setattr("visor_jax.evaluate.scoring.visual_tokens", counted)
    batches = single_questions(tiny_config(), "validation", 6).batches(4)
    score(model.params, batches, BUDGETS, model.arch, mesh=MESH)
    assert len(encoded) == 2


# --- figures ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["bg", "digit", "card", "above", "follow3", "mine"]), min_size=1, max_size=30))
def test_in_the_equal_mix_levels_and_their_tasks_weigh_the_same(tasks: list[str]) -> None:
    levels = {"bg": "easy", "digit": "easy", "card": "hard", "above": "hard", "follow3": "hard"}
    weights = level_weights(tasks, levels)
    by_task = {task: weights[[t == task for t in tasks]].sum() for task in set(tasks)}
    by_level: dict[str, list[float]] = {}
    for task, weight in by_task.items():
        by_level.setdefault(levels.get(task, ""), []).append(weight)
    for actual in by_level.values():
        assert actual == pytest.approx([1 / len(by_level) / len(actual)] * len(actual))
    assert weights.sum() == pytest.approx(1)


def test_levels_are_means_of_tasks() -> None:
    tasks = ["bg", "bg", "bg", "digit", "card"]
    levels = {"bg": "easy", "digit": "easy", "card": "hard"}
    accuracies = task_accuracies(np.array([True, True, False, False, True]), tasks)
    assert accuracies == {"bg": pytest.approx(2 / 3), "digit": 0.0, "card": 1.0}
    assert level_means(accuracies, levels) == {"easy": pytest.approx(1 / 3), "hard": 1.0}
    assert level_means({"all": 0.5}, levels) == {"easy": None, "hard": None}


def test_the_dense_row_reads_all_visual_tokens() -> None:
    """Savings of a model that packs or reduces are against a dense decoder that does not."""
    config = tiny_config()
    packing = tiny_config({"model.anyres.packing": 4})
    rows, own = [], []
    for one in (config, packing):
        questions, arch = single_questions(one, "test", 6), architecture(one, "full")
        (batch,) = questions.batches(6)
        num_visual, num_prompt, num_tiles, num_whole = sample_sizes(batch, arch).T
        nothing = np.zeros((0, 6))
        scores = Scores([], nothing, nothing, None, ["a"] * 6, batch.ids, num_visual, num_prompt, num_tiles, num_whole)
        rows.append(dense_row(arch, scores))
        own.append(int(num_visual.sum()))
    assert rows[0] == rows[1] and own[1] < own[0]


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(-8, 8), min_size=2, max_size=6))
def test_a_lower_dial_never_selects_a_more_expensive_budget(seed: int, dials: list[float]) -> None:
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(1, 5, 4))
    routes = rng.normal(size=(20, 4)).astype(np.float32)
    empty = np.zeros(0, int)
    scores = Scores(BUDGETS, np.zeros((4, 0)), np.zeros((4, 0)), routes, [], [], empty, empty, empty, empty)
    spent = [costs[choices(scores, costs, dial)] for dial in sorted(dials)]
    assert all((low <= high).all() for low, high in pairwise(spent))
    assert np.array_equal(choices(scores, costs, 0.0), routes.argmax(axis=1))
