"""`visor_jax.data.check`: what it finds in a set, in parallel, and after it was killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.layouts import LAYOUTS
from visor_jax.config import as_config
from visor_jax.data import chat, check_progress
from visor_jax.data.check import Running, check
from visor_jax.data.check_records import Findings, leaks, repeated
from visor_jax.data.from_config import make_source
from visor_jax.data.sample import Sample, SkipSample, Turn
from visor_jax.data.source_kind import SPLITS, RecordSource, as_records
from visor_jax.errors import RequestError, RunError
from visor_jax.testing import tiny_config

RANGE = 4


def record(id: str, picture: str, question: str = "Which color?", answer: str = "red") -> dict[str, Any]:
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": picture, "conversations": talk}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Progress is kept in a folder of the test, in ranges of a few records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(check_progress, "RANGE", RANGE)
    return tmp_path / "cache" / "visor_jax" / "data_check"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A set with one defect of every kind that `check` reports."""
    for number in range(12):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "2.png").read_bytes())
    (tmp_path / "half.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    records = [record(str(number), f"{number}.png") for number in range(12)]
    records += [
        record("12", "copy.png"),  # the pixels and the question of record 2
        record("12", "0.png", "Which digit?"),  # the id of record 12
        record("half", "half.png"),
        record("two", "1.png", "<image>"),
        record("long", "1.png", answer="many words " * 40),
        record("leak", "4.png", "The cat sat on the mat. Who sat there?", "the cat sat on the mat"),
    ]
    (tmp_path / "set.json").write_text(json.dumps(records))
    data = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "data.text_length": 100}
    return as_config(tiny_config({**data, "data.max_skipped_fraction": 1.0, "stages": ("full",)}))


def check_all(config: Any, **running: Any) -> dict[str, Any]:
    return check(config, {"all": make_source(config, "all")}, None, whole=True, running=Running(**running))


def test_every_kind_of_defect_is_reported_with_the_first_ids(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    facts = check_all(config)["splits"]["all"]
    assert facts["skipped"] == {"broken_image": 1, "image_count": 1, "too_long": 1}
    assert (facts["duplicate_ids"], facts["duplicates"], facts["answers_in_questions"]) == (1, 1, 1)
    assert facts["first_ids"] == {
        "broken_image": ["half"],
        "image_count": ["two"],
        "too_long": ["long"],
        "duplicate_ids": ["set.json[13] = set.json[12]"],
        "duplicates": ["set.json[12] = set.json[2]"],
        "answers_in_questions": ["leak"],
    }
    needed = facts["too_large"]["data.text_length"]["largest"]
    assert facts["too_large"] == {"data.text_length": {"samples": 1, "largest": needed}} and needed > 100
    printed = capsys.readouterr().out
    assert "        1  broken_image: half\n" in printed and f"data.text_length={needed} holds them all" in printed
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, text_length=needed))
    assert "too_long" not in check_all(larger)["skipped"]


def test_independent_turns(config: Any, tmp_path: Path) -> None:
    """Pictures of later turns are reported, and rows are as long as turns with one beginning need them."""
    late = {**record("late", "1.png"), "image": ["1.png", "2.png"]}
    late["conversations"] = [*late["conversations"], *record("", "", "Which digit?", "7")["conversations"]]
    many = record("many", "1.png")
    many["conversations"] += [{"from": who, "value": "red?"} for _ in range(12) for who in ("human", "gpt")]
    (tmp_path / "set.json").write_text(json.dumps([late, many, record("ok", "3.png")]))
    needed = []
    for independent in (False, True):
        settings = {
            "independent_turns": independent,
            "text_length": 100,
            "tiles": 4,
            "visual_length": 80,
            "test_fraction": 0.0,
        }
        facts = check_all(dataclasses.replace(config, data=dataclasses.replace(config.data, **settings)))
        assert facts["splits"]["all"]["skipped"] == {"too_long": 1, **({"late_picture": 1} if independent else {})}
        needed.append(facts["splits"]["all"]["too_large"]["data.text_length"]["largest"])
    assert needed[1] < needed[0], "what turns share is there once, and no line break follows a turn"


def test_a_sample_without_targets_is_skipped(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All targets masked: no answer of a valid record is like that, so the mask is taken away here."""

    def masked(*arguments: Any, **options: Any) -> chat.EncodedConversation:
        encoded = encode(*arguments, **options)
        return dataclasses.replace(encoded, target_mask=[False] * len(encoded.token_ids))

    encode = chat.encode_conversation
    monkeypatch.setattr(chat, "encode_conversation", masked)
    with pytest.raises(RunError, match="split 'train' has no usable sample") as stopped:
        check_all(config)
    assert stopped.value.result is not None and stopped.value.result["skipped"]["no_target"] == 15


def test_processes_find_the_same_and_list_in_order(config: Any, tmp_path: Path) -> None:
    found = {}
    for workers in (0, 2):
        listing = tmp_path / f"{workers}.jsonl"
        found[workers] = (check_all(config, workers=workers, listing=str(listing)), listing.read_text())
    assert found[0] == found[2] and found[0][1].count("\n") == 18


@dataclasses.dataclass(frozen=True)
class Bare:
    """A source of `size` texts; a worker that reads number `deadly` dies while the file `trap` exists."""

    size: int
    deadly: int = -1
    trap: str = ""
    name: str = "bare"
    unusable: bool = False
    seconds: float = 0.0  # that reading a record takes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.seconds)
        if self.unusable:
            raise SkipSample("no", "never")
        if index == self.deadly and os.path.exists(self.trap) and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index % 5 == 3:
            raise SkipSample("broken_image", f"number {index}")
        return Sample(str(index), (), (Turn(f"number {index % 9}?", "yes"),), self.name)


@dataclasses.dataclass(frozen=True)
class Halves:
    """A mixture: the records of one source after those of another."""

    sources: list[Bare]
    name: str = "mixture"

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, index: int) -> tuple[Bare, int]:
        first = len(self.sources[0])
        return (self.sources[0], index) if index < first else (self.sources[1], index - first)

    def __getitem__(self, index: int) -> Sample:
        source, own = self.locate(index)
        return source[own]

    def record_facts(self, index: int) -> tuple[str, int]:
        return str(self.locate(index)[1]), 0

    def place(self, index: int) -> str:
        source, own = self.locate(index)
        return f"{source.name}[{own}]"

    def duplicate_ids(self) -> int:
        return 0

    def splits_of(self, index: int) -> tuple[str, ...]:
        return SPLITS

    def empty_split(self, *splits: str) -> RequestError:
        return RequestError("")

    def picture_files(self, index: int) -> list[Any]:
        return []


def test_a_killed_check_continues(config: Any, tmp_path: Path, cache: Path) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    source = Bare(20, deadly=17, trap=str(trap))
    expected = check(config, {"train": Bare(20)}, None, whole=False)
    with pytest.raises(RunError, match="a worker process died"):
        check(config, {"train": source}, None, whole=False, running=Running(workers=1))
    (kept,) = cache.iterdir()
    lines = kept.read_text().splitlines()
    assert [json.loads(line)["start"] for line in lines] == [0, 4, 8, 12]
    altered = lines[0].replace("number 3", "number three")
    kept.write_text("\n".join([altered, *lines[1:], '{"start": 16, "fin']))  # the last line was cut off by the kill
    trap.unlink()
    again = check(config, {"train": source}, None, whole=False)
    assert again["first"] == {"broken_image": "number three"}  # read back, not checked again
    assert {**again, "first": None} == {**expected, "first": None}
    assert not [*cache.iterdir()]


def test_sources_of_a_mixture_are_counted_one_by_one(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them has no usable record: training would draw from it in vain."""
    mixture = Halves([Bare(10), Bare(2, name="empty", unusable=True)])
    with pytest.raises(RunError, match="training would stop: empty has no usable record") as stopped:
        check(config, dict.fromkeys(("train", "test"), mixture), None, whole=True)
    assert stopped.value.result is not None
    assert stopped.value.result["splits"]["train"]["sources"] == {
        "bare": {"samples": 10, "usable": 8, "skipped": {"broken_image": 2}, "first_ids": {"broken_image": ["3", "8"]}},
        "empty": {"samples": 2, "usable": 0, "skipped": {"no": 2}, "first_ids": {"no": ["0", "1"]}},
    }
    printed = capsys.readouterr().out
    assert "        2  of empty, 0 usable\n             2 no: 0, 1\n" in printed


def test_samples_of_the_training_split_in_other_splits(tmp_path: Path) -> None:
    """Copies of a picture have other names, so the rule that divides the splits does not see them."""
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.png")
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / "a.png").read_bytes())
    records = [record(str(number), f"{number}.png") for number in range(20)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    for split, part in {"train": records[:5], "validation": records[5:7], "test": records[7:10]}.items():
        part = [record(one["id"], one["image"], "Else?") for one in part] if split == "test" else part
        (tmp_path / f"{split}.json").write_text(json.dumps(part))
    data = {"source": "llava", "root": str(tmp_path), "path": "set.json", "test_fraction": 0.25}
    for path, expected in {"set.json": None, "{split}.json": {"validation": 2}}.items():
        fields = {f"data.{name}": value for name, value in {**data, "path": path}.items()}
        config = as_config(tiny_config({**fields, "stages": ("full",)}))
        splits = ("all",) if expected is None else SPLITS
        result = check(config, {split: make_source(config, split) for split in splits}, None, whole=True)
        source = make_source(config, "all") if expected is None else None
        if isinstance(source, RecordSource):
            members = [source.splits_of(index) for index in range(20)]
            expected = {split: members.count((split,)) for split in ("validation", "test")}
            assert all(expected.values())
        assert result["shared_with_training"] == expected


def test_other_data_and_settings_do_not_continue_a_check(config: Any, tmp_path: Path) -> None:
    def identity(changed: Any = config) -> str:
        source = make_source(changed, "all")
        assert isinstance(source, RecordSource)
        checker = check_progress.RecordChecker(changed, "all", source, listing=False)
        return check_progress.identity(checker, 18)

    def changed(**fields: Any) -> Any:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))

    before = identity()
    assert identity(changed(workers=3)) == before  # may differ when the check continues
    assert identity(changed(text_length=99)) != before
    Image.new("RGB", (30, 20), "white").save(tmp_path / "5.png")
    after = identity()
    assert after != before
    os.utime(tmp_path / "set.json", (1, 1))
    assert identity() != after


def test_restart_and_an_unwritable_cache(config: Any, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir(parents=True)
    cache.touch()  # a file in place of the folder
    expected = check_all(config)
    assert "cannot be written" in caplog.text
    cache.unlink()
    source = make_source(config, "all")
    assert isinstance(source, RecordSource)
    checker = check_progress.RecordChecker(config, "all", source, listing=False)
    progress = check_progress.Progress.of(checker, 18)
    progress.add(0, checker.check([14]))
    assert [*check_progress.Progress.of(checker, 18).finished] == [0]
    assert check_all(config, restart=True) == expected


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        ("the cat sat on the mat", "The cat  sat on\nthe mat. Who sat there?", True),
        ("A cat sat on the mat.", "<image>\nRepeat: a cat sat on the mat", True),
        ("B", "Which?\nA. a cat\nB. a dog", False),
        ("a brown old dog", "Which?\nA. a black cat\nB. A brown old dog\nAnswer with the choice.", False),
        ("the man throws a ball to his dog, and the dog then brings it back", "Which?\n"
         "(A) The man throws a ball to his dog, and the dog then brings it back.\n(B) Nothing happens.", False),
        ("a brown old dog", "Is it a black cat, a brown old dog or a bird?", False),
        ("yes", "Is it red, yes or no?", False),
        ("not in the question", "What is it?", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_answers_in_prompts(answer: str, prompt: str, expected: bool) -> None:
    assert leaks(answer, prompt) is expected


def test_repetitions_name_the_first_record() -> None:
    assert repeated([7, 3, 7, 0, 0, 3, 7]) == [(2, 0), (5, 1), (6, 0)]
    assert repeated([]) == []
    keys = np.random.default_rng(0).integers(1, 2**63, 1000).tolist()
    assert repeated(keys) == []


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixture"])
def test_every_source_can_be_checked_by_other_processes(layout: str, tmp_path: Path) -> None:
    """A worker gets a pickled copy."""
    source, write = LAYOUTS.get(layout, LAYOUTS["llava"])
    data = {"source": source, "root": str(tmp_path / "data"), "path": write(tmp_path / "data"), "tiles": 4,
            "visual_length": 200}  # fmt: skip
    if layout == "mixture":
        (tmp_path / "data" / "mix.yaml").write_text("- {json_path: set.json, sampling_strategy: 'random:50%'}\n")
        data |= {"mixture": "mix.yaml", "path": ""}
    config = as_config(tiny_config({f"data.{name}": value for name, value in data.items()} | {"stages": ("full",)}))
    opened = make_source(config, "all")
    assert isinstance(opened, RecordSource)
    checker = check_progress.RecordChecker(config, "all", opened, listing=True)
    found = checker.check(range(len(opened)))
    assert pickle.loads(pickle.dumps(checker)).check(range(len(opened))).state() == found.state()
    assert found.samples == (6 if layout == "mixture" else 12) and not found.skipped
    assert Findings.of(json.loads(json.dumps(found.state()))) == found


def test_an_interrupted_check_stops_its_workers_at_once(config: Any, cache: Path) -> None:
    """They do not finish the ranges that they have begun."""
    slow = Bare(40, seconds=0.3)
    checker = check_progress.RecordChecker(config, "train", as_records(slow, "train"), listing=False)
    results = check_progress.check_ranges(checker, 40, 2, check_progress.Progress(cache / "kept.jsonl"))
    next(results)
    assert multiprocessing.active_children()
    results.close()  # as when KeyboardInterrupt passes through it
    assert not multiprocessing.active_children()
    assert 1 <= len(check_progress.Progress(cache / "kept.jsonl").finished) < 10
