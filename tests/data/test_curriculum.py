"""A curriculum: which part every position of the stream comes from, and what a stage's steps read."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visor_jax.config import TrainConfig, apply_overrides, stage_config, validate
from visor_jax.data.curriculum import Phase, PhasedMixture, phase_number, phases_of
from visor_jax.data.pipeline import ExampleStream, make_pipeline
from visor_jax.data.sample import Part, Sample
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config


class Numbers:
    """A source whose sample i is named "<name>/<i>"."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return Sample(f"{self.name}/{index}", (), (), self.name)


PARTS = (
    Part(Numbers("endless", 2**40), 2.0, shuffle=False, path="endless"),
    Part(Numbers("stored", 7), 1.0, path="stored"),
    Part(Numbers("other", 2**40), 1.0, shuffle=False, path="other"),
)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any).map(tuple)


@given(st.lists(st.tuples(st.integers(1, 60), WEIGHTS), min_size=1, max_size=4), st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_no_sample_is_repeated_or_left_out_when_phases_change(lengths: list[Any], seed: int) -> None:
    starts = [0, *itertools.accumulate(length for length, _ in lengths)]
    phases = [Phase(start, weights) for start, (_, weights) in zip(starts, lengths, strict=False)]
    stream = ExampleStream(PARTS, lambda sample: sample.id, seed, phases)
    drawn = [stream[position] for position in range(starts[-1])]
    for name in ("endless", "other"):
        ids = [id for id in drawn if id.startswith(f"{name}/")]
        assert ids == [f"{name}/{number}" for number in range(len(ids))]
    stored = [id for id in drawn if id.startswith("stored/")]
    for start in range(0, len(stored) - 6, 7):
        assert len({*stored[start : start + 7]}) == 7, "each epoch shows every record once, also across phases"
    for phase, end in zip(phases, starts[1:], strict=True):
        used = {id.partition("/")[0] for id in drawn[phase.start : end]}
        assert used <= {part.path for part, weight in zip(PARTS, phase.weights, strict=True) if weight}


def test_shares_follow_the_weights_of_each_phase() -> None:
    mixture = PhasedMixture([Phase(0, (3.0, 1.0, 0.0)), Phase(40, (0.0, 1.0, 1.0)), Phase(100, (0.0, 0.0, 2.0))])
    shares = [Counter(mixture[place][0] for place in span) for span in (range(40), range(40, 100), range(100, 120))]
    assert shares == [{0: 30, 1: 10}, {1: 30, 2: 30}, {2: 20}]
    assert mixture[100] == (2, 30)


def test_one_phase_reads_what_a_stream_without_a_curriculum_reads() -> None:
    plain = ExampleStream(PARTS, lambda sample: sample.id, 3)
    phased = ExampleStream(PARTS, lambda sample: sample.id, 3, [Phase(0, (2.0, 1.0, 1.0))])
    assert [plain[place] for place in range(50)] == [phased[place] for place in range(50)]


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_stream_with_phases_resumes_at_any_step(process_count: int) -> None:
    train = TrainConfig(batch_size=4, curriculum=((0, (("endless", 1.0),)), (3, (("stored", 1.0), ("other", 2.0)))))
    stream = ExampleStream(PARTS, lambda sample: sample.id, 5, phases_of(train, PARTS))

    def steps(start: int, stop: int) -> list[list[str]]:
        batches = [list[str]() for _ in range(start, stop)]
        for index in range(process_count):
            with make_pipeline(
                stream, list, batch_size=4, start_step=start, process_index=index, process_count=process_count
            ) as pipeline:
                for batch, mine in zip(batches, pipeline, strict=False):
                    batch += mine
        return batches

    straight = steps(0, 8)
    assert [{id.partition("/")[0] for id in batch} for batch in straight[:4]] == [
        *[{"endless"}] * 3,
        {"stored", "other"},
    ]
    for start in (1, 3, 5):
        assert steps(start, 8) == straight[start:]


def test_the_weights_of_the_parts_hold_before_the_first_phase() -> None:
    train = TrainConfig(batch_size=10, curriculum=((2, (("other", 1.0),)), (5, (("stored", 2.0),))))
    assert phases_of(train, PARTS) == [Phase(0, (2, 1, 1)), Phase(20, (0, 0, 1)), Phase(50, (0, 2, 0))]
    assert [phase_number(train, step) for step in (1, 2, 3, 5, 6, 100)] == [1, 1, 2, 2, 3, 3]
    from_start = TrainConfig(curriculum=((0, (("other", 1.0),)), (2, (("stored", 2.0),))))
    assert [phase_number(from_start, step) for step in (1, 2, 3)] == [1, 1, 2]
    assert phase_number(TrainConfig(), 7) == 0
    with pytest.raises(RequestError, match=r"curriculum: 'othr': expected the path of a part.*did you mean 'other'"):
        phases_of(TrainConfig(curriculum=((0, (("othr", 1.0),)),)), PARTS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("((0, (('a.json', 1), ('c.json', 1))),)", r"full\.curriculum: 'c\.json': expected the path of a part"),
        ("((0, (('a.json', 0),)),)", r"full\.curriculum=.*not all 0"),
        ("((0, ()),)", r"full\.curriculum=.*not all 0"),
        ("((0, (('a.json', -1), ('b.json', 1))),)", r"full\.curriculum=.*at least 0"),
        ("((0, (('a.json', 1), ('a.json', 1))),)", r"full\.curriculum=.*different parts"),
        ("((5, (('a.json', 1),)), (5, (('b.json', 1),)))", r"full\.curriculum=.*increasing steps"),
        ("((-1, (('a.json', 1),)),)", r"full\.curriculum=.*increasing steps"),
        ("((0, 'a.json'),)", r"full\.curriculum=.*: expected a list of pairs \(text, a number\)"),
        ("a.json", r"full\.curriculum=a\.json: expected a list of pairs"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_a_wrong_request(value: str, message: str) -> None:
    config = tiny_config({"stages": ("full",), "data.parts": (("", "a.json", "", 1.0), ("", "b.json", "", 1.0))})
    with pytest.raises(RequestError, match=message) as caught:
        apply_overrides(config, [f"--config.stage_overrides.full.curriculum={value}"])
    assert "\n" not in str(caught.value)


def test_a_curriculum_needs_parts_answers_and_steps_of_a_fixed_size() -> None:
    given = "((0, (('a.json', 1),)),)"
    parts = "--config.data.parts=(('', 'a.json', '', 1),)"
    config = tiny_config({"stages": ("full",)})
    for overrides, message in (
        ([f"stage_overrides.full.curriculum={given}"], "expected data.parts or data.mixture"),
        (
            [parts, "data.pack_window=8", "data.pool_tiles=4", f"stage_overrides.full.curriculum={given}"],
            "pack_window=8",
        ),
        (
            [parts, f"stage_overrides.policy.curriculum={given}"],
            "policy.curriculum: has no effect on objective='policy'",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            apply_overrides(config, overrides)
    everywhere = apply_overrides(config, [parts, f"train.curriculum={given}"])
    assert stage_config(everywhere, "policy").curriculum == ((0, (("a.json", 1.0),)),), "the policy does not read it"
    assert validate(everywhere) == everywhere


def test_the_field_survives_json(tmp_path: Path) -> None:
    from visor_jax.config import load_config, to_json

    file = tmp_path / "config.json"
    config = apply_overrides(
        tiny_config({"data.parts": (("", "a.json", "", 1.0),)}),
        ["train.curriculum=((0, (('a.json', 1),)), (9, (('a.json', 2),)))"],
    )
    file.write_text(to_json(config))
    assert load_config(file).train.curriculum == ((0, (("a.json", 1.0),)), (9, (("a.json", 2.0),)))
