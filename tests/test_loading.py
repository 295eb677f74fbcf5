"""The Python interface: loading, answers with receipts, logits, routes, and refusals."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visor_jax
from visor_jax.budget import Budget, budget_name
from visor_jax.cost import decoder_flops, tower_flops
from visor_jax.data.questions import single_questions
from visor_jax.data.sample import Sample
from visor_jax.errors import RequestError
from visor_jax.loading import Visor, load
from visor_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Visor:
    return load(tiny_run)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(single_questions(tiny_config(), "test", 4))


def ask(sample: Sample) -> tuple[Image.Image, str]:
    return Image.fromarray(sample.images[0]), sample.turns[0].question


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_workdir_gives_its_newest_stage(model: Visor, tiny_run: Path) -> None:
    assert model.stage == "policy" and model.has_policy
    assert {(False, False), (True, True)} <= set(model.viable_budgets)
    full = visor_jax.load(str(tiny_run / "full"), plan="visor")
    assert full.stage == "full" and not full.has_policy


def test_a_dense_stage_ignores_the_search_of_a_later_one(tiny_run: Path) -> None:
    base = load(tiny_run / "base")
    assert base.arch.plan == "dense" and not base.searched and base.viable_budgets == [()]


def test_a_workdir_may_be_called_like_a_stage(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "full", ignore=shutil.ignore_patterns("base", "warmup", "universal"))
    assert load(tmp_path / "full").stage == "policy"
    assert load(tmp_path / "full" / "full").stage == "full"


def test_parameters_in_another_dtype(tiny_run: Path) -> None:
    assert load(tiny_run / "full", dtype="bfloat16").params["norm"]["scale"].dtype == "bfloat16"


def test_what_cannot_be_loaded(tiny_run: Path, tiny_copy: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path / "none" / "full"):
        with pytest.raises(RequestError, match="none"):
            load(place)
    with pytest.raises(RequestError, match=r"plan=dense: .* plan 'visor'"):
        load(tiny_run, plan="dense")
    (tiny_copy / "policy" / "complete.json").unlink()
    assert load(tiny_copy).stage == "universal"
    with pytest.raises(RequestError, match="stage 'policy' is not complete"):
        load(tiny_copy / "policy")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["empty", "full", "auto"])
def test_many_answers_are_the_same_as_one_by_one(model: Visor, samples: list[Sample], budget: str) -> None:
    questions = [ask(sample) for sample in samples]
    many = model.answer_many(questions, budget, max_new_tokens=4)
    for question, answer in zip(questions, many, strict=True):
        alone = model.answer(*question, budget=budget, max_new_tokens=4)
        without_time = {"seconds": 0.0, "seconds_to_first_token": 0.0, "seconds_compiling": 0.0}
        assert dataclasses.replace(alone, **without_time) == dataclasses.replace(answer, **without_time)


def test_the_receipt(model: Visor, samples: list[Sample]) -> None:
    image, question = ask(samples[0])
    half = budget_name(next(bits for bits in model.viable_budgets if sum(bits) == 1))
    answers = {name: model.answer(image, question, name, max_new_tokens=4) for name in ("empty", half, "full")}
    for name, answer in answers.items():
        assert answer.budget == name
        assert answer.flops - answer.decoder_flops == pytest.approx(tower_flops(model.arch, 1))
        assert 0 < answer.seconds_to_first_token <= answer.seconds
    assert answers["empty"].decoder_flops < answers[half].decoder_flops < answers["full"].decoder_flops
    assert answers["empty"].cache_bytes < answers[half].cache_bytes < answers["full"].cache_bytes
    prompt = model._prompt(image, question)
    at_least = decoder_flops(model.arch, (True, True), prompt.size.visual, prompt.size.text)
    assert at_least <= answers["full"].decoder_flops < 1.5 * at_least


def test_auto_takes_the_likeliest_route_and_the_dial_moves_it(model: Visor, samples: list[Sample]) -> None:
    image, question = ask(samples[0])
    route = model.route(image, question)
    assert route.shape == (len(model.viable_budgets),) and route.sum() == pytest.approx(1, abs=1e-6)
    assert (route >= 0).all()
    picked = str(Budget.of(model.viable_budgets[int(route.argmax())]))
    assert model.answer(image, question, max_new_tokens=1).budget == picked
    assert model.answer(image, question, max_new_tokens=1, dial=-1e4).budget == "empty"
    assert model.answer(image, question, max_new_tokens=1, dial=1e4).budget == "full"


def test_logits_are_one_row_a_text_token_and_agree_with_the_answer(model: Visor, samples: list[Sample]) -> None:
    image, question = ask(samples[1])
    prompt = model._prompt(image, question)
    place = int(prompt.visual_positions.min())
    text = prompt.text_tokens.tolist()
    ids = [*text[:place], model.tokenizer.image_token_id, *text[place:]]
    for budget in ("empty", "full"):
        logits = model.logits(ids, [image], budget)
        assert logits.shape == (len(text), model.arch.text.vocab_size) and logits.dtype == np.float32
        first = int(logits[-1].argmax())
        expected = "" if first == model.tokenizer.end_token_id else model.tokenizer.decode([first])
        assert model.answer(image, question, budget, max_new_tokens=1).text == expected
    assert not np.allclose(model.logits(ids, [image], "empty"), model.logits(ids, [image], "full"))
    assert model.logits(ids, [image], "auto").shape == (len(text), model.arch.text.vocab_size)


def test_pictures_as_arrays_and_in_lists_are_the_same(model: Visor, samples: list[Sample]) -> None:
    image, question = ask(samples[0])
    texts = {
        model.answer(picture, question, "full", max_new_tokens=4).text
        for picture in (image, np.asarray(image), [image], image.convert("RGBA"))
    }
    assert len(texts) == 1


def test_transparency_is_laid_over_white_as_in_training(model: Visor, samples: list[Sample]) -> None:
    image, _ = ask(samples[0])
    clear, ids = Image.new("RGBA", image.size, (0, 0, 0, 0)), [model.tokenizer.image_token_id, 5, 6]
    white, black = (Image.new("RGB", image.size, color) for color in ("white", "black"))
    logits = [model.logits(ids, [picture], "full") for picture in (clear, white, black)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_questions(model: Visor, samples: list[Sample]) -> None:
    image, question = ask(samples[0])
    with pytest.raises(RequestError, match="question: is empty"):
        model.answer(image, "  ", "full")
    with pytest.raises(RequestError, match="0b101"):
        model.answer(image, question, "0b101")
    with pytest.raises(RequestError, match="ful"):
        model.answer(image, question, "ful")
    with pytest.raises(RequestError, match="image: expected a picture file's path or bytes, a PIL image"):
        model.answer(np.zeros((4, 4)), question, "full")
    with pytest.raises(RequestError, match="max_new_tokens=0"):
        model.answer(image, question, "full", max_new_tokens=0)
    with pytest.raises(RequestError, match=r"temperature=-1\.0"):
        model.answer(image, question, "full", temperature=-1.0)
    with pytest.raises(RequestError, match="dial=nan"):
        model.answer(image, question, "auto", dial=math.nan)
    with pytest.raises(RequestError):
        model.logits([1, 2, 3], [image], "full")  # a picture and no placeholder


def test_auto_needs_a_policy(tiny_run: Path, samples: list[Sample]) -> None:
    early = load(tiny_run / "full")
    for use in (lambda: early.answer(*ask(samples[0])), lambda: early.route(*ask(samples[0]))):
        with pytest.raises(RequestError, match="no trained policy"):
            use()
