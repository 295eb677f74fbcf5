"""Answers of an untrained model equal those of the full forward pass, singly, in batches and in streams."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture
from visor_jax.budget import budget_name
from visor_jax.cost import cache_bytes, decode_flops, decoder_flops, route_flops, tower_flops
from visor_jax.data.chat import encode_conversation
from visor_jax.data.collate import Example
from visor_jax.data.sample import Turn
from visor_jax.errors import RequestError
from visor_jax.generate import engine
from visor_jax.generate.answer import Answer
from visor_jax.generate.engine import Engine, PrefillState
from visor_jax.generate.request import Bits, tokens_of
from visor_jax.loading import Visor

pytestmark = pytest.mark.usefixtures("quick")
TOKENIZER = testing.almanac_tokenizer()


VIABLE = [(False,), (True,)]
WIDE, TALL, SMALL = (testing.random_picture(*size, seed=i) for i, size in enumerate([(20, 90), (40, 9), (8, 8)]))
QUESTIONS = [
    (WIDE, "Which digit is below A?"),
    ([], "Count the labels."),
    (TALL, "What?"),
    ([SMALL, WIDE], "Is <image> or <image> red?"),
]


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Visor]) -> Visor:
    return make_model("dense")


def without_times(answer: Answer) -> Answer:
    return dataclasses.replace(answer, seconds=0.0, seconds_to_first_token=0.0, seconds_compiling=0.0)


class Spy:
    """Records the engine's prefills and batches, and every token that it generates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.prefilled: list[tuple[Example, PrefillState]] = []
        self.batches: list[tuple[Bits, list[PrefillState]]] = []
        self.generated: dict[int, list[int]] = {}  # by the id of the prefilled state
        prefill_shared, tokens = Engine.prefill_shared, Engine.tokens

        def spied_prefill(engine: Engine, prompt: Example, **settings: Any) -> PrefillState:
            self.prefilled.append((prompt, prefill_shared(engine, prompt, **settings)))
            return self.prefilled[-1][1]

        def spied_tokens(
            engine: Engine, rows: Sequence[PrefillState], bits: Bits, *rest: Any
        ) -> Iterator[list[int | None]]:
            self.batches.append((bits, list(rows)))
            for step in tokens(engine, rows, bits, *rest):
                for row, token in zip(rows, step, strict=True):
                    self.generated.setdefault(id(row), []).extend([] if token is None else [token])
                yield step

        monkeypatch.setattr(Engine, "prefill_shared", spied_prefill)
        monkeypatch.setattr(Engine, "tokens", spied_tokens)

    def tokens(self, number: int) -> list[int]:
        """Returns the tokens generated for the prompt that was prefilled as `number`."""
        return self.generated[id(self.prefilled[number][1])]


def with_answer(prompt: Example, tokens: list[int]) -> Example:
    """Returns the prompt followed by the tokens of an answer."""
    count = len(tokens)
    return prompt._replace(
        text_tokens=np.append(prompt.text_tokens, np.array(tokens, np.int32)),
        text_positions=np.append(prompt.text_positions, prompt.length + np.arange(count, dtype=np.int32)),
        loss_mask=np.append(prompt.loss_mask, np.zeros(count, bool)),
        turn_index=np.append(prompt.turn_index, np.full(count, -1, np.int32)),
        length=prompt.length + count,
    )


def best_tokens(model: Visor, prompt: Example, tokens: list[int], bits: Bits) -> list[int]:
    """Returns the best token at each position of the answer, from one full forward pass over prompt and answer."""
    logits = model._engine.logits(with_answer(prompt, tokens[:-1]), bits)[-len(tokens) :].copy()
    logits[:, TOKENIZER.image_token_id] = -np.inf
    return logits.argmax(axis=-1).tolist()


# --- the full forward pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["empty", "full", "dense"])
def test_greedy_answers_are_those_of_the_full_forward_pass(
    budget: str, model: Visor, dense: Visor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch of questions that differ in length and in number and size of pictures."""
    tested, name = (dense, "full") if budget == "dense" else (model, budget)
    spy = Spy(monkeypatch)
    answers = tested.answer_many(QUESTIONS, name, max_new_tokens=6)
    for number, answer in enumerate(answers):
        prompt, tokens = spy.prefilled[number][0], spy.tokens(number)
        bits = () if budget == "dense" else ((budget == "full"),)
        assert best_tokens(tested, prompt, tokens, bits) == tokens and 1 <= len(tokens) <= 6
        assert answer.text == TOKENIZER.decode(tokens) and answer.budget == budget
        assert answer.complete == (tokens[-1] == TOKENIZER.end_token_id)
    ((_, rows),) = spy.batches
    assert len(rows) == 4 and len({row.row_shape for row in rows}) > 2, "one batch with rows of several sizes"


# --- batches ----------------------------------------------------------------------------------------------------------


def test_many_are_answered_by_route_exactly_as_one_by_one(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_new_tokens": 5, "temperature": 1.3, "top_p": 0.9, "seed": 5}
    alone = [model.answer(*question, **settings) for question in QUESTIONS]
    spy = Spy(monkeypatch)
    together = model.answer_many(QUESTIONS, **settings)
    assert [without_times(answer) for answer in together] == [without_times(answer) for answer in alone]
    assert len(spy.prefilled) == len(QUESTIONS), "the shared prefill runs once, not again after routing"
    routes = Counter({budget_name(bits): len(rows) for bits, rows in spy.batches})
    assert routes == Counter(answer.budget for answer in alone) and len(routes) == 2
    assert model.answer_many([]) == []


def test_more_questions_than_are_prefilled_ahead(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.answer_many(QUESTIONS, "empty", max_new_tokens=6)
    monkeypatch.setattr("visor_jax.generate.visor.PREFILL_AHEAD", 3)
    spy = Spy(monkeypatch)
    answers = model.answer_many(QUESTIONS, "empty", max_new_tokens=6)
    assert [without_times(answer) for answer in answers] == [without_times(answer) for answer in expected]
    assert [len(rows) for _, rows in spy.batches] == [3, 1]


def test_several_budgets_share_a_prefill(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is the one that its budget gives alone; a question that cannot be asked gives its error."""
    budgets: dict[str, Bits | None] = {"empty": (False,), "full": (True,), "auto": None}
    expected = {name: model.answer_many(QUESTIONS, name, max_new_tokens=6) for name in budgets}
    monkeypatch.setattr("visor_jax.generate.visor.PREFILL_AHEAD", 3)
    spy = Spy(monkeypatch)
    answered = model.answer_budgets([QUESTIONS[0], (b"no picture", "What?"), *QUESTIONS[1:]], budgets, 6)
    error = answered.pop(1)
    assert isinstance(error, RequestError) and str(error).startswith("image: ")
    for number, one in enumerate(answered):
        assert not isinstance(one, RequestError)
        assert one.size == spy.prefilled[number][0].size
        for name, answers in expected.items():
            assert without_times(one.answers[name]) == without_times(answers[number])
    assert len(spy.prefilled) == len(QUESTIONS), "the pictures are encoded once for all budgets"
    decoded = Counter(budget_name(bits) for bits, rows in spy.batches for _ in rows)
    assert decoded == {"empty": 4, "full": 4}, "the policy's budget is not decoded again"


def test_the_policy_alone_decodes_what_it_picks(model: Visor, make_model: Callable[..., Visor]) -> None:
    (one,) = model.answer_budgets([QUESTIONS[0]], {"auto": None}, 6)
    assert not isinstance(one, RequestError)
    assert without_times(one.answers["auto"]) == without_times(model.answer(*QUESTIONS[0], max_new_tokens=6))
    with pytest.raises(RequestError, match="no trained policy"):
        make_model().answer_budgets([QUESTIONS[0]], {"auto": None})


def test_a_dense_model_has_one_budget(dense: Visor) -> None:
    (one,) = dense.answer_budgets([QUESTIONS[0]], {"full": ()}, 6)
    assert not isinstance(one, RequestError) and one.answers["full"].budget == "dense"
    assert without_times(one.answers["full"]) == without_times(dense.answer(*QUESTIONS[0], "full", 6))


# --- conversations ----------------------------------------------------------------------------------------------------

HISTORY = [("What colour is A?", "red"), ("Which digit is it?", "4")]


def training_ids(question: str, history: list[tuple[str, str]], pictures: int) -> list[int]:
    """Returns the token ids of the conversation in training, up to the answer to its last question."""
    turns = [Turn(*turn) for turn in [*history, (question, "?")]]
    ids = encode_conversation(TOKENIZER, turns, num_images=pictures).token_ids
    return ids[: -len([*TOKENIZER.encode("?"), TOKENIZER.end_token_id, *TOKENIZER.encode("\n")])]


@pytest.mark.parametrize("pictures", [[], [WIDE], [SMALL, WIDE]], ids=["none", "one", "two"])
def test_a_follow_up_question_is_asked_in_the_conversation_as_it_was_trained(
    pictures: list[np.ndarray], model: Visor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same token ids give the same route and the same greedy answer in `answer`, `stream` and `answer_many`."""
    first = "<image>\n" * len(pictures) + HISTORY[0][0]
    ids = training_ids("And where?", [(first, HISTORY[0][1]), HISTORY[1]], len(pictures))
    request = {"image": pictures, "question": "And where?", "history": HISTORY}
    prompt = model._prompt(**request)
    assert prompt.text_tokens.tolist() == [token for token in ids if token != TOKENIZER.image_token_id]
    positions = tokens_of(ids, pictures, TOKENIZER, model.arch)
    np.testing.assert_array_equal(prompt.text_positions, positions.text_positions)
    np.testing.assert_array_equal(prompt.visual_positions, positions.visual_positions)
    assert prompt.length == positions.length, "the routing token follows the last question"

    routes = np.exp(np.asarray(model._engine.prefill_shared(positions, routed=True).scores)[0, : len(VIABLE)])
    np.testing.assert_allclose(model.route(**request), routes / routes.sum(), rtol=1e-5)
    spy = Spy(monkeypatch)
    answer = model.answer(**request, max_new_tokens=5)
    ((bits, _),), tokens = spy.batches, spy.tokens(0)
    assert best_tokens(model, positions, tokens, bits) == tokens
    stream = model.stream(**request, max_new_tokens=5)
    many = model.answer_many([tuple(request.values()), (pictures, "And where?")], max_new_tokens=5)
    assert without_times(stream.answer) == without_times(many[0]) == without_times(answer)
    assert without_times(many[1]) == without_times(model.answer(pictures, "And where?", max_new_tokens=5))


def test_markers_say_to_which_turn_of_a_conversation_a_picture_belongs(model: Visor) -> None:
    history = [("<image>\nWhat colour is A?", "red")]
    prompt = model._prompt([SMALL, WIDE], "Is <image> red too?", history)
    ids = training_ids("Is <image> red too?", history, 2)
    expected = tokens_of(ids, [SMALL, WIDE], TOKENIZER, model.arch)
    np.testing.assert_array_equal(prompt.visual_positions, expected.visual_positions)
    with pytest.raises(RequestError, match="1 <image> markers for 2 pictures"):
        model.answer([SMALL, WIDE], "And?", history=history)


def test_none_and_an_empty_list_are_no_picture(model: Visor) -> None:
    answers = [model.answer(image, "What?", "full", max_new_tokens=3) for image in (None, [], ())]
    assert len(set(map(without_times, answers))) == 1


# --- forms of pictures and questions ----------------------------------------------------------------------------------


def test_a_picture_is_a_path_bytes_or_an_array(
    model: Visor, png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wide.png").write_bytes(png)
    monkeypatch.setenv("HOME", str(tmp_path))
    file, opened = tmp_path / "wide.png", Image.open(io.BytesIO(png))
    forms = [WIDE, file, str(file), "~/wide.png", png, bytearray(png), memoryview(png), opened, [file], (png,)]
    for form in [*forms, iter([file])]:
        np.testing.assert_array_equal(model._prompt(form, "What?").tiles, model._prompt(WIDE, "What?").tiles)


def test_a_generator_is_read_as_it_is_answered(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visor_jax.generate.visor.PREFILL_AHEAD", 2)
    spy, read = Spy(monkeypatch), list[int]()  # number of prefilled prompts when each question was read

    def questions() -> Iterator[Any]:
        for question in QUESTIONS:
            read.append(len(spy.prefilled))
            yield question

    answers = model.answer_many(questions(), "empty", max_new_tokens=3)
    assert read == [0, 0, 2, 2], "further questions are read after the first two are answered"
    assert [without_times(a) for a in answers] == [without_times(a) for a in model.answer_many(QUESTIONS, "empty", 3)]


def test_repr_describes_the_loaded_model(model: Visor, dense: Visor, make_model: Callable[..., Visor]) -> None:
    assert "from" not in repr(model)
    named = make_model(searched=True, stage="universal", source="runs/x")
    size = sum(leaf.size for leaf in jax.tree.leaves(named.params))
    assert repr(named) == (
        f"<Visor from runs/x, stage universal: {size:,} parameters in float32, plan visor, 1 slots, "
        "viable budgets empty full, no policy>"
    )
    assert "plan dense" in repr(dense) and "slots" not in repr(dense)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilations() -> list[str]:
    """Grows by one for every program that is traced or compiled."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: events.append(name) if "/compile/" in name else None
    )
    return events


def test_a_question_of_another_length_compiles_no_program(
    compilations: list[str], make_model: Callable[..., Visor]
) -> None:
    model = make_model(has_policy=True, searched=True)

    def ask(picture: np.ndarray, question: str, **settings: Any) -> None:
        for budget in ("auto", "empty", "full"):
            model.answer(picture, question, budget, **settings)
        model.route(picture, question)

    before = len(compilations)
    ask(testing.random_picture(20, 90, seed=1), "What?", max_new_tokens=9, temperature=0.5)
    warm = len(compilations)
    assert warm > before
    other = testing.random_picture(21, 85, seed=2)
    ask(
        other,
        "Which is more, Rome or Oslo, or what is below it?",
        max_new_tokens=15,
        temperature=0.7,
        top_p=0.8,
        seed=3,
    )
    assert compilations[warm:] == []


def test_a_long_answer_outgrows_its_cache(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache starts with capacity for 64 text tokens and doubles, here twice."""
    spy = Spy(monkeypatch)
    answer = model.answer(*QUESTIONS[0], "full", max_new_tokens=120)
    prompt, tokens = spy.prefilled[0][0], spy.tokens(0)
    assert len(tokens) == 120 and prompt.size.text + 119 > 2 * 64
    assert best_tokens(model, prompt, tokens, (True,)) == tokens
    assert answer.text == TOKENIZER.decode(tokens) and not answer.complete
    assert answer.cache_bytes == cache_bytes(model.arch, (True,), prompt.size.visual, prompt.size.text + 119, 4)


# --- receipts: time ---------------------------------------------------------------------------------------------------


def test_neither_time_of_an_answer_includes_compilation(
    make_model: Callable[..., Visor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances only during tracing, which is part of compilation."""
    clock = 0.0
    monkeypatch.setattr("visor_jax.generate.programs.time", SimpleNamespace(perf_counter=lambda: clock))

    def slowly(function: Any) -> Any:
        def traced(*args: Any, **settings: Any) -> Any:
            nonlocal clock
            clock += 10.0
            return function(*args, **settings)

        return traced

    for name in ("encode", "prefill", "decode"):
        monkeypatch.setattr(f"visor_jax.generate.engine.{name}", slowly(getattr(engine, name)))
    model = make_model(has_policy=True)
    answers = [model.answer(WIDE, "What?", "full", max_new_tokens=3) for _ in range(2)]
    assert [answer.seconds_compiling for answer in answers] == [30.0, 0.0]
    assert {(answer.seconds_to_first_token, answer.seconds) for answer in answers} == {(0.0, 0.0)}
    batch = model.answer_many([(WIDE, "What?"), (None, "What?")], "full", max_new_tokens=3)
    assert [answer.seconds_compiling for answer in batch] == [20.0, 30.0], "a prompt without pictures has other shapes"


# --- receipts ---------------------------------------------------------------------------------------------------------


def test_the_receipt_counts_what_ran(model: Visor) -> None:
    for question in QUESTIONS[:2]:
        prompt, answer = model._prompt(*question).size, model.answer(*question, max_new_tokens=4)
        bits = next(bits for bits in VIABLE if budget_name(bits) == answer.budget)
        assert not answer.complete, "three of the four tokens were fed back"
        expected = decoder_flops(model.arch, bits, prompt.visual, prompt.text)
        expected += route_flops(model.arch, prompt.visual, prompt.text)
        expected += sum(decode_flops(model.arch, bits, prompt.visual, prompt.text + n) for n in (1, 2, 3))
        assert answer.decoder_flops == pytest.approx(expected)
        assert answer.flops - answer.decoder_flops == pytest.approx(tower_flops(model.arch, prompt.tiles))
        assert answer.cache_bytes == cache_bytes(model.arch, bits, prompt.visual, prompt.text + 3, 4)
        assert 0 < answer.seconds_to_first_token < answer.seconds


# --- ends -------------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_an_answer_and_are_not_in_it(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    question, spy = QUESTIONS[0], Spy(monkeypatch)
    model.answer(*question, "full", max_new_tokens=12)
    tokens = spy.tokens(0)
    texts = [TOKENIZER.decode([token]) for token in tokens]
    end = next(i for i in range(1, 12) if tokens[i] not in tokens[:i] and TOKENIZER.encode(texts[i]) == [tokens[i]])
    answer = model.answer(*question, "full", max_new_tokens=12, stop=[texts[end], "<|endoftext|>"])
    assert answer.text == TOKENIZER.decode(tokens[:end]) and answer.complete
    for stop, text in ((tokens[end], answer.text), (tokens[0], "")):
        monkeypatch.setattr(model, "stop_token_ids", frozenset({stop}))
        stopped = model.answer(*question, "full", max_new_tokens=12)
        assert (stopped.text, stopped.complete) == (text, True)


def test_each_row_of_a_batch_ends_on_its_own(model: Visor, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    model.answer_many(QUESTIONS, "empty", max_new_tokens=6)
    longer = [spy.tokens(number) for number in range(len(QUESTIONS))]
    stop = next(token for tokens in longer for token in tokens if not all(token in others for others in longer))
    monkeypatch.setattr(model, "stop_token_ids", frozenset({stop}))
    answers = model.answer_many(QUESTIONS, "empty", max_new_tokens=6)
    for tokens, answer in zip(longer, answers, strict=True):
        end = tokens.index(stop) if stop in tokens else 6
        assert (answer.text, answer.complete) == (TOKENIZER.decode(tokens[:end]), stop in tokens)
    assert len({answer.complete for answer in answers}) == 2


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 1}])
def test_a_stream_is_the_answer_in_pieces(settings: dict[str, Any], model: Visor) -> None:
    stream = model.stream(*QUESTIONS[0], max_new_tokens=20, **settings)
    pieces = list(stream)
    answer = model.answer(*QUESTIONS[0], max_new_tokens=20, **settings)
    assert "".join(pieces) == answer.text and len(pieces) > 3 and all(pieces)
    assert without_times(stream.answer) == without_times(answer)
    assert list(stream) == [], "a stream can be read only once"


def test_the_receipt_of_a_stream_waits_for_its_end(model: Visor) -> None:
    stream = model.stream(*QUESTIONS[0], max_new_tokens=8)
    first = next(stream)
    assert stream.answer.text.startswith(first) and len(stream.answer.text) > len(first)


def test_seeds(model: Visor) -> None:
    texts = [
        model.answer(*QUESTIONS[0], "empty", max_new_tokens=12, temperature=2.0, seed=seed).text
        for seed in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_searched_model_takes_viable_budgets_only(model: Visor) -> None:
    some = Visor(model.params, model.arch, TOKENIZER, VIABLE[:1], searched=True)
    with pytest.raises(RequestError, match="budget 'full' is not viable: expected one of empty"):
        some.answer(*QUESTIONS[0], "full")
    unsearched = Visor(model.params, model.arch, TOKENIZER, VIABLE[:1])
    assert unsearched.answer(*QUESTIONS[0], "full", max_new_tokens=1).budget == "full"


def test_answering_leaves_parameters_unchanged(make_model: Callable[..., Visor]) -> None:
    model = make_model()
    params = testing.random_params(model.arch)
    model.answer(WIDE, "What?", budget="full", max_new_tokens=2)
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_several_pictures_without_a_marker_come_first(model: Visor) -> None:
    answer = model.answer([SMALL, WIDE], "Is one red?", "full", max_new_tokens=3)
    assert without_times(answer) == without_times(
        model.answer([SMALL, WIDE], "<image>\n<image>\nIs one red?", "full", max_new_tokens=3)
    )
    with pytest.raises(RequestError, match="1 <image> markers for 2 pictures"):
        model.answer([SMALL, WIDE], "Is <image> red?", "full")


def test_a_small_picture_is_read_in_its_place(model: Visor) -> None:
    """Alone in a tile, with the positions of its window: the answer depends on the picture and on its origin."""
    vision = dataclasses.replace(model.arch.vision, tile_size=16)
    anyres = AnyResArchitecture(standardize=True, small_pictures=True)
    arch = dataclasses.replace(model.arch, vision=vision, anyres=anyres)
    small = Visor(testing.random_params(arch), arch, model.tokenizer, model.viable_budgets)
    image = testing.random_picture(8, 4, seed=1)
    answer = partial(small.answer, question="Which digit?", budget="full", max_new_tokens=8)
    assert answer(image, origin=(0, 0)).text == answer(image, origin=(0, 0)).text
    assert len({answer(image, origin=origin).text for origin in [(0, 0), (2, 3), (1, 0), (2, 1)]}) > 1
    with pytest.raises(RequestError, match=r"small_picture: .*exceed the tile's grid"):
        answer(image, origin=(3, 0))
    with pytest.raises(RequestError, match=r"data\.small_pictures=False"):
        model.answer(image, "Which digit?", "full", origin=(0, 0))
