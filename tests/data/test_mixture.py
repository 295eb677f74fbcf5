"""Mixtures: LLaVA-NeXT's files as they are, strategies, weights, and what every pass reads of them."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.commands.recipe import run_stages
from visor_jax.config import apply_overrides, as_config, from_dict, validate
from visor_jax.config.mixture import read_mixture
from visor_jax.config.overrides import TrainOverrides
from visor_jax.config.sampling import parse_sampling
from visor_jax.data.from_config import evaluation_source, label_source, make_source, stage_parts
from visor_jax.data.mixture import MixedSource
from visor_jax.data.pipeline import ExampleStream
from visor_jax.data.questions import single_questions
from visor_jax.data.sampling import Select
from visor_jax.data.sources import check_source, source_kind
from visor_jax.errors import RequestError
from visor_jax.evaluate.runner import evaluate
from visor_jax.loading import load
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import annotations_checksum

SIZES = {"a": 8, "b": 40, "c": 4}
NEXT = """
datasets:
- json_path: a.json
  sampling_strategy: all
- json_path: {sub/b}.jsonl
  sampling_strategy: "first:50%"
- json_path: sub/c.json
  sampling_strategy: end:3
"""


def write_set(root: Path, name: str, count: int) -> None:
    """Records about a picture each; the ids begin with the set's name."""
    file = root / f"{name}{'.jsonl' if name.endswith('b') else '.json'}"
    file.parent.mkdir(parents=True, exist_ok=True)
    letter = file.stem
    records = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{letter}{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{letter}."}]
        records.append({"id": f"{letter}{number}", "image": f"{letter}{number}.png", "conversations": talk})
    lines = "\n".join(map(json.dumps, records)) if file.suffix == ".jsonl" else json.dumps(records)
    file.write_text(lines)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, count in (("a", 8), ("sub/b", 40), ("sub/c", 4)):
        write_set(tmp_path, name, count)
    (tmp_path / "mix.yaml").write_text(NEXT.replace("{sub/b}", "sub/b"))
    return tmp_path


def configured(root: Path | str, **data: Any) -> Any:
    fields = {"root": str(root), "mixture": "mix.yaml", "test_fraction": 0.0, "text_length": 128, **data}
    return tiny_config({"stages": ("full",), **{f"data.{name}": value for name, value in fields.items()}})


def ids(source: Any) -> list[str]:
    return [source[index].id for index in range(len(source))]


def test_a_file_of_llava_next_is_read_as_it_is(root: Path) -> None:
    config = configured(root)
    check_source(as_config(config))
    source = make_source(config, "train")
    assert isinstance(source, MixedSource) and source.name == "mix" and source.duplicate_ids() == 0
    expected = {f"a{n}" for n in range(8)} | {f"b{n}" for n in range(20)} | {"c1", "c2", "c3"}
    assert len(source) == len(expected) and set(ids(source)) == expected
    assert Counter(source[index].source for index in range(len(source))) == {"a": 8, "b": 20, "c": 3}
    first = Counter(source[index].source for index in range(11))
    assert first == {"a": 3, "b": 7, "c": 1}, "every source has its share of the first records"
    assert {source.place(index) for index in range(len(source))} >= {"c.json[3]", "b.jsonl[19]"}
    assert source.record_facts(0)[1] == 1 and len(list(source.picture_files(0))) == 1
    assert ids(pickle.loads(pickle.dumps(source))) == ids(source), "as a worker process gets it"
    again = from_dict(json.loads(json.dumps(as_config(config).to_dict())))
    assert ids(make_source(again, "train")) == ids(source)


def test_the_parts_of_the_stream_have_their_shares(root: Path) -> None:
    parts = stage_parts(configured(root), "full")
    assert [part.source.name for part in parts] == ["a", "b", "c"] and all(part.shuffle for part in parts)
    stream = ExampleStream(parts, lambda sample: sample.id, seed=3)
    epoch = [stream[place] for place in range(31)]
    assert len(set(epoch)) == 31, "an epoch shows every record once"
    entries = [("", "a.json", "", 1.0), ("llava", "sub/b.jsonl", "all", 3.0)]
    weighted = stage_parts(configured(root, mixture="", parts=entries), "full")
    drawn = Counter(ExampleStream(weighted, lambda sample: sample.source, seed=3)[place] for place in range(400))
    assert drawn == {"a": 100, "b": 300}


def test_every_pass_reads_the_mixture(root: Path) -> None:
    config = configured(root, test_fraction=0.25)
    kind = source_kind(as_config(config))
    assert kind.stored_splits(as_config(config)) == ["all"]
    whole = kind.open(as_config(config), "all")
    parts = {split: set(ids(make_source(config, split))) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == len(whole) == 31
    kind.check_splits(as_config(config), {"train", "test"})
    assert set(ids(label_source(config))) == parts["train"]
    assert set(ids(evaluation_source(config, "test"))) == parts["test"]
    assert len(list(single_questions(config, "test", 100))) == len(parts["test"])
    trained = {id for part in stage_parts(config, "full") for id in ids(part.source)}
    assert trained == parts["train"]


def test_a_separate_file_for_each_split(root: Path) -> None:
    for split, count in (("train", 5), ("test", 2)):
        write_set(root, f"own-{split}", count)
    entries = [("", "own-{split}.json", "", 0.0), ("", "a.json", "first:4", 0.0)]
    config = as_config(configured(root, mixture="", parts=entries, test_fraction=0.3))
    kind = source_kind(config)
    assert kind.stored_splits(config) == ["train", "validation", "test"]
    assert {source.name for source in make_source(config, "train").sources} >= {"own-train"}
    tested = ids(make_source(config, "test"))
    assert sum(id.startswith("own-test") for id in tested) == 2


def test_an_entry_may_have_a_folder_of_its_own(root: Path) -> None:
    write_set(root / "other", "d", 3)
    (root / "mix.yaml").write_text("- path: a.json\n- {path: d.json, root: other}\n")
    config = configured(root)
    source = make_source(config, "train")
    assert set(ids(source)) == {*(f"a{n}" for n in range(8)), "d0", "d1", "d2"}
    before = annotations_checksum(config.to_dict(), "train")
    (root / "other" / "d.json").write_text((root / "other" / "d.json").read_text() + "\n")
    assert annotations_checksum(config.to_dict(), "train") != before


def test_the_checksum_follows_every_file(root: Path) -> None:
    config = configured(root).to_dict()
    before = annotations_checksum(config, "train")
    assert before and annotations_checksum(config, "train") == before
    for name in ("sub/c.json", "mix.yaml"):
        (root / name).write_text((root / name).read_text() + "\n")
        after = annotations_checksum(config, "train")
        assert after != before
        before = after
    (root / "mix.yaml").unlink()
    assert annotations_checksum(config, "train") == ""


@pytest.mark.parametrize(
    ("strategy", "count", "expected"),
    [
        ("all", 5, [0, 1, 2, 3, 4]),
        ("first:2", 5, [0, 1]),
        ("first:10%", 5, [0]),
        ("first:100%", 5, [0, 1, 2, 3, 4]),
        ("end:2", 5, [3, 4]),
        ("end:41%", 5, [2, 3, 4]),
        ("random:9", 5, [0, 1, 2, 3, 4]),
        ("random", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_strategies_choose_as_llava_does(strategy: str, count: int, expected: list[int]) -> None:
    assert list(Select(strategy, 0, "x")(count)) == expected


def test_a_random_subset_is_a_function_of_the_seed_and_the_name(root: Path) -> None:
    chosen = {
        key: list(Select(f"random:{size}", seed, name)(1000))
        for key, (size, seed, name) in {
            "a": (100, 7, "x.json"),
            "again": ("10%", 7, "x.json"),
            "seed": (100, 8, "x.json"),
            "name": (100, 7, "y.json"),
            "larger": (200, 7, "x.json"),
        }.items()
    }
    assert chosen["a"] == chosen["again"] == sorted(set(chosen["a"])) and len(chosen["a"]) == 100
    assert chosen["a"] != chosen["seed"] and chosen["a"] != chosen["name"] and {*chosen["a"]} < {*chosen["larger"]}
    entries = [("", "a.json", "", 0.0), ("", "sub/b.jsonl", "random:10", 0.0)]
    orders = [configured(root, mixture="", parts=order) for order in (entries, entries[::-1])]
    assert len({frozenset(ids(make_source(config, "train"))) for config in orders}) == 1
    single = configured(root, mixture="", source="llava", path="sub/b.jsonl", sampling="random:10")
    assert set(ids(make_source(single, "train"))) < set(ids(make_source(orders[0], "train")))


@pytest.mark.parametrize("text", ["", "first", "frst:3", "first:0", "first:-1", "first:1.5", "first:0%", "all:3"])
def test_other_strategies_are_refused(text: str, root: Path) -> None:
    if text == "first":
        assert parse_sampling(text).size(5) == 5  # as LLaVA reads it
        return
    with pytest.raises(ValueError, match="expected"):
        parse_sampling(text)
    config = configured(root, mixture="", source="llava", path="a.json")
    with pytest.raises(RequestError, match=r"data\.sampling="):
        validate(apply_overrides(config, [f"--config.data.sampling={text}"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `datasets:` with a list"),
        ("datasets: 3", "expected `datasets:` with a list"),
        ("datasets: []", "expected `datasets:` with a list"),
        ("datasets:\n- json_path: [a", r"mix\.yaml line 2 column \d+: not YAML"),
        ("datasets:\n\n- a.json", r"mix\.yaml line 3 \(datasets\[0\]\): expected an entry .* got str"),
        (
            "- path: a.json\n- json_pth: b",
            r"line 2 \(datasets\[1\]\): unknown key 'json_pth'.*did you mean 'json_path'",
        ),
        ("- path: a.json\n  json_path: b.json", "json_path repeats path"),
        ("- path: 3", "json_path=3: expected the name of a file"),
        ("- sampling_strategy: all", "json_path=None: expected the name of a file"),
        ("- path: a.json\n  sampling_strategy: some:3", "sampling_strategy='some:3': expected all, first:N"),
        ("- path: a.json\n  sampling_strategy: 3", "sampling=3: expected text"),
        ("- path: a.json\n  weight: -1", "weight=-1: expected a number above 0"),
        ("- path: a.json\n  weight: .nan", "weight=nan: expected a number above 0"),
        (
            "- path: a.json\n  weight: 2\n- path: sub/b.jsonl",
            r"line 3 \(datasets\[1\]\): no weight; expected a weight on",
        ),
        ("- path: a.txt", r"'a\.txt': no source and an unknown ending; expected one of \.json"),
        ("- path: a.json\n  source: lava", "source='lava': expected one of llava, .*did you mean 'llava'"),
        ("- path: a.json\n  source: almanac", "source='almanac': expected one of llava"),
        ("- path: none.json", r"line 1 \(datasets\[0\]\): data\.path: cannot read .*none\.json: No such file"),
        ("- path: none*.json", r"line 1 .*matches no file"),
        ("- path: ../a.json", r"json_path='\.\./a\.json': expected a path below data\.root"),
        ("- path: /etc/passwd", r"expected a path below data\.root"),
        ("- {path: a.json, root: ..}", r"root='\.\.': expected a path below data\.root"),
        ("- {path: ../../a.json, root: sub}", r"json_path='\.\./\.\./a\.json': expected a path below data\.root"),
        ("- {path: a.json, root: 3}", r"root=3: expected text"),
        ("- path: ~/a.json", r"expected a path below data\.root"),
        ("- path: gs://b/a.json", r"expected a path below data\.root"),
        ("- &x {path: a.json}\n- *x", r"line 2: the alias \*x; expected the value"),
        ("- path: !!python/object/apply:os.system [touch CANARY]", r"line 1 column \d+: not YAML that is read: could"),
        ("- path: 2020-99-99", "not YAML that is read"),
        ("\x00", "not YAML that is read"),
    ],
)
def test_a_mixture_that_does_not_fit_is_a_wrong_request(
    text: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / "mix.yaml").write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        make_source(configured(root), "train")
    assert "\n" not in str(caught.value) and not (root / "CANARY").exists()


def test_absolute_paths_below_the_root_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "mix.yaml").write_text(f"- json_path: {root}/a.json\n")
    assert len(make_source(configured(root), "train")) == 8
    assert len(make_source(configured("", mixture=str(root / "mix.yaml")), "train")) == 8
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "own.yaml").write_text("- json_path: a.json\n")
    monkeypatch.chdir(root / "elsewhere")
    assert len(make_source(configured(root, mixture="own.yaml"), "train")) == 8, "a file of the current folder"
    with pytest.raises(RequestError, match=r"cannot read .*none\.yaml: No such file"):
        read_mixture({"root": str(root), "mixture": "none.yaml"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["path=a.json", "mixture=mix.yaml"], r"data\.path and data\.mixture: expected one of data\.path"),
        (["mixture=mix.yaml", "sampling=first:3"], r"data\.sampling='first:3': chooses records of data\.path"),
        (["parts=[('', '', '', 0.0)]"], r"data\.parts="),
        (["parts=[('', 'a.json', 'none:3', 0.0)]"], r"data\.parts="),
        (["parts=[('', 'a.txt', '', 0.0)]"], r"data\.parts\[0\]: 'a\.txt': no source and an unknown ending"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    config = tiny_config({"stages": ("full",)})
    with pytest.raises(RequestError, match=message):
        check_source(validate(apply_overrides(config, [f"--config.data.{override}" for override in overrides])))


def test_samples_of_several_sources_train(root: Path, tmp_path: Path) -> None:
    objective = make_objective(configured(root), "full", Workdir(tmp_path / "run"))
    steps = list(objective.steps(0, 8))
    assert {id[0] for step in steps for id in step.ids} == {"a", "b", "c"}
    again = list(objective.steps(4, 8))
    for theirs, mine in zip(steps[4:], again, strict=True):
        assert all(np.array_equal(array, mine.arrays[key]) for key, array in theirs.arrays.items())


def test_a_curriculum_weighs_the_entries_of_a_file_by_their_paths(root: Path, tmp_path: Path) -> None:
    phases = ((0, (("sub/b.jsonl", 1.0),)), (2, (("a.json", 1.0), ("sub/c.json", 1.0))))
    run = Workdir(tmp_path / "run")
    config = as_config(configured(root))
    full = TrainOverrides.of(**{**config.stage_overrides.full, "curriculum": phases})
    config = dataclasses.replace(config, stage_overrides=dataclasses.replace(config.stage_overrides, full=full))
    steps = list(make_objective(config, "full", run).steps(0, 4))
    assert [{id[0] for id in step.ids} for step in steps] == [{"b"}, {"b"}, {"a", "c"}, {"a", "c"}]
    full = TrainOverrides.of(**{**full, "curriculum": ((0, (("b.jsonl", 1.0),)),)})
    config = dataclasses.replace(config, stage_overrides=dataclasses.replace(config.stage_overrides, full=full))
    with pytest.raises(RequestError, match=r"curriculum of stage 'full': 'b\.jsonl': .*did you mean 'sub/b\.jsonl'"):
        next(iter(make_objective(config, "full", run).steps(0, 4)))


def test_data_commands_read_the_mixture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "b1.png").write_bytes(b"no picture")
    fields = {"stages": ("full",), "data.root": str(root), "data.mixture": "mix.yaml", "data.text_length": 128}
    code = f"from visor_jax.testing import tiny_config\n\n\ndef get_config():\n    return tiny_config({fields!r})\n"
    (root / "config.py").write_text(code)
    config = f"--config={root / 'config.py'}"
    assert main(["data", "check", config, "--config.data.max_skipped_fraction=0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["samples"], result["skipped"]) == (31, {"image_format": 1})
    sources = result["splits"]["all"]["sources"]
    assert {name: (counts["samples"], counts["skipped"]) for name, counts in sources.items()} == {
        "a": (8, {}),
        "b": (20, {"image_format": 1}),
        "c": (3, {}),
    }
    for action, out in (("preview", "sheet.png"), ("build", "built")):
        extra = ["--format=array_record"] if action == "build" else []
        assert main(["data", action, config, f"--out={root / out}", *extra]) == 0
    assert main(["data", "stats", config]) == 0
    built = configured(root, mixture="", source="array_record", path="built/all.array_record")
    assert len(make_source(built, "train")) == 30


@pytest.mark.slow
def test_a_run_over_a_mixture_completes_every_stage(root: Path, tmp_path: Path) -> None:
    stages = ("warmup", "full", "search", "universal", "label", "policy")
    entries = [("", "a.json", "", 1.0), ("", "sub/b.jsonl", "random:50%", 2.0)]
    fields = {"stages": stages, "stage_overrides.warmup.init_from": "", "label.samples": 8, "data.workers": 2}
    data = {"data.root": str(root), "data.parts": entries, "data.test_fraction": 0.25, "data.text_length": 128}
    config = tiny_config({**fields, **data}, steps=2)
    check_source(as_config(config))
    run_stages(config, str(tmp_path / "run"), stages)
    workdir = Workdir(tmp_path / "run")
    result = evaluate(from_dict(workdir.config()), load(workdir.path), workdir)
    assert result["benchmark"] == "mixture" and result["budgets"]["full"]["samples"] > 0
    run_stages(config, str(tmp_path / "run"), stages)  # complete: nothing is read again
    (root / "a.json").write_text((root / "a.json").read_text() + "\n")
    (tmp_path / "run" / "policy" / "complete.json").unlink()
    with pytest.raises(RequestError, match="was begun with other data"):
        run_stages(config, str(tmp_path / "run"), stages)
