"""Order of stages: complete ones are skipped, missing ones are named, another configuration is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.checkpoint.manager import Checkpoints
from visor_jax.commands import recipe as stages
from visor_jax.commands.recipe import evaluation_data, is_complete, run_stages
from visor_jax.config import as_config
from visor_jax.errors import RequestError
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.evaluate.runner import chunks_of, evaluate, evaluation_identity
from visor_jax.files.read_write import read_json, write_json
from visor_jax.loading import load
from visor_jax.testing import tiny_config
from visor_jax.workdir import visible
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")


def test_all_stages_ran_and_are_skipped_the_next_time(
    tiny_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = tiny_config(), sorted(tiny_copy.rglob("*"))
    for folder in ("search", "labels"):  # a kill after the result leaves them
        (tiny_copy / folder / "chunks" / "digest").mkdir(parents=True)
    seconds = run_stages(config, str(tiny_copy), config.stages)["stages"]
    assert seconds == dict.fromkeys(config.stages, 0.0)
    assert capsys.readouterr().out.splitlines() == [f"{stage}: complete" for stage in config.stages]
    assert sorted(p for p in tiny_copy.rglob("*") if "lock" not in p.name) == [
        p for p in before if "lock" not in p.name
    ]


def test_stages_run_in_the_order_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(stages, "run_stage", lambda config, workdir, stage: ran.append(stage) or 1.0)
    config = tiny_config()
    run_stages(config, str(tmp_path / "run"), config.stages)
    assert ran == ["base", "warmup", "full", "search", "universal", "label", "policy"]


@pytest.mark.slow
def test_another_pattern_goes_through_every_stage_and_is_exported(tmp_path: Path) -> None:
    """All stages run; the export, which compares with PyTorch, loads again."""
    other = {"model.pattern": ("text", "self", "text", "cross"), "model.head_layers": 2, "model.text.num_layers": 11}
    config, workdir = tiny_config(other), tmp_path / "run"
    run_stages(config, str(workdir), config.stages)
    assert main(["export", f"--workdir={workdir}"]) == 0
    assert load(workdir / "export").arch.layers == load(workdir).arch.layers


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("warmup", "init_from='base'"),
        ("full", "init_from='warmup'"),
        ("search", "stage 'full' is not complete; run it first"),
        ("universal", "run the search first"),
        ("label", "stage 'universal' is not complete; run it first"),
        ("policy", "run the label stage first"),
    ],
)
def test_what_has_to_come_first_is_named(tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        run_stages(tiny_config(), str(tmp_path / "run"), [stage])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is not there"), ('{"token": "other"}', "holds something else")]
)
def test_a_workdir_that_not_all_processes_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, problem: str
) -> None:
    monkeypatch.setattr(visible, "SECONDS", 0.0)
    lock = tmp_path / "lock.json"
    if content is not None:
        lock.write_text(content)
    with pytest.raises(RequestError, match=f"was written by process 0 and {problem} for this one; expected a folder"):
        stages.check_visible(lock, "mine")
    lock.write_text('{"token": "mine"}')
    stages.check_visible(lock, "mine")


def test_label_needs_the_search_too(tiny_copy: Path) -> None:
    (tiny_copy / "search" / "viable.json").unlink()
    (tiny_copy / "labels" / "labels.json").unlink()
    with pytest.raises(RequestError, match="run the search first"):
        run_stages(tiny_config(), str(tiny_copy), ["label"])


def test_another_configuration_is_refused_by_name(tiny_copy: Path) -> None:
    with pytest.raises(RequestError, match=r"holds another configuration: model\.text\.intermediate_size is 48 there"):
        run_stages(tiny_config({"model.text.intermediate_size": 96}), str(tiny_copy), ["full"])
    run_stages(tiny_config({"train.keep": 5, "name": "other"}), str(tiny_copy), ["full"])


def test_a_refused_request_leaves_the_configuration_as_it_was(tiny_copy: Path) -> None:
    before = (tiny_copy / "config.json").read_bytes()
    shutil.rmtree(tiny_copy / "policy")
    (tiny_copy / "labels" / "labels.npz").unlink()
    with pytest.raises(RequestError, match="run the label stage first"):
        run_stages(tiny_config({"stages": ("policy",), "name": "other"}), str(tiny_copy), ["policy"])
    assert (tiny_copy / "config.json").read_bytes() == before


def as_the_first_version_left_it(path: Path) -> None:
    record = read_json(path / "config.json")
    record.pop("random_numbers")
    write_json(path / "config.json", record)


@pytest.mark.parametrize("unfinished", ["full/complete.json", "search/viable.json", "labels/labels.npz", "policy"])
def test_a_run_is_not_gone_on_with_other_random_numbers(tiny_copy: Path, unfinished: str) -> None:
    as_the_first_version_left_it(tiny_copy)
    before = (tiny_copy / "config.json").read_bytes()
    gone = tiny_copy / unfinished
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    config = tiny_config()
    with pytest.raises(RequestError, match="begun by a version that draws other random numbers") as refused:
        run_stages(config, str(tiny_copy), config.stages)
    assert "\n" not in str(refused.value) and (tiny_copy / "config.json").read_bytes() == before


def test_a_complete_run_of_other_random_numbers_is_still_read(tiny_copy: Path) -> None:
    as_the_first_version_left_it(tiny_copy)
    config = tiny_config()
    assert set(run_stages(config, str(tiny_copy), config.stages)["stages"].values()) == {0.0}
    assert load(tiny_copy).stage == "policy"


def test_a_checkpoint_of_other_random_numbers_is_not_resumed(tiny_copy: Path) -> None:
    """Also without `config.json`, which identifies the workdir's configuration."""
    workdir, config = Workdir(tiny_copy), tiny_config()
    as_the_first_version_left_it(tiny_copy)
    theirs = workdir.identity(config, "full")
    (tiny_copy / "config.json").unlink()
    folder = tiny_copy / "full" / "checkpoints"
    with Checkpoints(tiny_copy / "other", identity=theirs, keep=1) as saved:
        saved.save(4, {"params": {"x": np.zeros(2, np.float32)}}, wait=True)
    shutil.rmtree(folder)
    (tiny_copy / "other").rename(folder)
    (tiny_copy / "full" / "complete.json").unlink()
    with pytest.raises(RequestError, match=r"random_numbers is \(none\) there and 2 here"):
        run_stages(config, str(tiny_copy), ["full"])


def test_search_and_label_are_complete_by_their_results(tiny_copy: Path) -> None:
    from visor_jax.workdir.folder import Workdir

    workdir = Workdir(tiny_copy)
    assert all(is_complete(workdir, stage) for stage in tiny_config().stages)
    (tiny_copy / "labels" / "labels.npz").unlink()
    (tiny_copy / "search" / "viable.json").unlink()
    assert not is_complete(workdir, "label") and not is_complete(workdir, "search")


def test_questions_from_another_source(tmp_path: Path) -> None:
    config = as_config(tiny_config())
    assert evaluation_data(config, "", "") is config
    (tmp_path / "mine.json").write_text("[]")
    for data in (tmp_path, tmp_path / "mine.json"):
        changed = evaluation_data(config, "llava", str(data))
        assert (changed.data.source, changed.data.root, changed.data.path) == ("llava", str(tmp_path), "mine.json")
    for name in ("other.JSONL", "other.ndjson"):
        folder = tmp_path / name.upper()
        folder.mkdir()
        (folder / name).write_text("[]")
        (folder / "sheet.png").write_bytes(b"")
        assert evaluation_data(config, "llava", str(folder)).data.path == name
    assert evaluation_data(changed, "almanac", "").data.source == "almanac"
    parts = {"data.path": "", "data.parts": (("almanac", "lists", "all", 1.0),), "data.question_part": "lists"}
    assert evaluation_data(as_config(tiny_config(parts)), "almanac", "").data.parts == ()
    for name, source in (("a.parquet", "parquet"), ("a.array_record", "array_record"), ("noted.txt", "llava")):
        assert evaluation_data(config, "", str(tmp_path / name)).data.source == source
    mixed = evaluation_data(config, "", str(tmp_path / "mix.yaml"))
    assert (mixed.data.root, mixed.data.mixture, mixed.data.test_fraction) == (str(tmp_path), "mix.yaml", 0.0)
    assert evaluation_data(mixed, "", "") is mixed
    again = evaluation_data(mixed, "llava", str(tmp_path / "mine.json"))
    assert (again.data.path, again.data.mixture) == ("mine.json", "")
    for benchmark, data, message in (
        ("docvqa", "", "expected .*almanac, or llava"),
        ("llava", "", "needs --data"),
        ("almanac", "mine.json", "takes no --data=mine.json"),
    ):
        with pytest.raises(RequestError, match=message):
            evaluation_data(config, benchmark, data)


@pytest.mark.parametrize("stage_names", [("full", "search"), ("full",)])
def test_an_empty_split_is_refused_before_the_first_step(tmp_path: Path, stage_names: tuple[str, ...]) -> None:
    """All twenty records have the same picture, so `validation`, which only the search reads, is empty."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "Color?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(number), "image": "a.png", "conversations": talk} for number in range(20)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": stage_names}
    config, steps = tiny_config(changes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_stage", lambda config, workdir, stage: steps.append(stage))
        for also_reads in ((), ("test",)):
            if "search" in stage_names or also_reads:
                with pytest.raises(RequestError, match=r"leaves split '(validation|test)'.* without any of the 20"):
                    stages.run_stages(config, str(tmp_path / "run"), ["full"], also_reads)
            else:
                stages.run_stages(config, str(tmp_path / "run"), ["full"], also_reads)
    assert steps == ([] if "search" in stage_names else ["full"])


# --- later passes read the results of earlier ones --------------------------------------------------------------------


def write_records(folder: Path, answer: str = "a", shade: int = 0) -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(folder / "0.png")
    (folder / "set.json").write_text(json.dumps([{"id": 0, "image": "0.png", "conversations": conversation}]))


@pytest.mark.parametrize("changed", [{"answer": "b"}, {"shade": 9}], ids=["records", "pictures"])
def test_data_that_change_between_stages_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(stages, "run_stage", lambda config, workdir, stage: 1.0)
    write_records(tmp_path)
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "data.test_fraction": 0.0}
    config = tiny_config({**changes, "stages": ("warmup", "full"), "stage_overrides.warmup.init_from": ""})
    run_stages(config, str(tmp_path / "run"), ["warmup"])
    run_stages(config, str(tmp_path / "run"), ["full"])
    write_records(tmp_path, **changed)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(RequestError, match=r"was begun with other data: \w+ is .* there"):
        run_stages(config, str(tmp_path / "run"), ["full"])
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def narrow(path: Path) -> None:
    """Writes other viable budgets, as from a search with other data."""
    actual = read_json(path / "search" / "viable.json")
    write_json(path / "search" / "viable.json", {**actual, "viable": ["0b00", "0b11"]})


@pytest.mark.parametrize("stage", ["universal", "label", "policy"])
def test_a_complete_stage_of_other_budgets_is_refused(tiny_copy: Path, stage: str) -> None:
    actual = read_json(tiny_copy / "search" / "viable.json")["viable"]
    if actual == ["0b00", "0b11"]:
        write_json(tiny_copy / "search" / "viable.json", {"num_slots": 2, "viable": ["0b00", "0b01", "0b11"]})
    else:
        narrow(tiny_copy)
    with pytest.raises(RequestError, match=r"viable|budgets"):
        run_stages(tiny_config(), str(tiny_copy), [stage])


@pytest.fixture
def finished(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of what `finish` created, in order; export and report are replaced by stubs."""
    import visor_jax.evaluate.runner as runner
    import visor_jax.export.torch_export as torch_export
    import visor_jax.report.page as page

    created, evaluate = [], runner.evaluate

    def export(model: Any, out: Path, *, stage: str, force: bool, about: Any) -> None:
        created.append("export")
        write_json(out / "config.json", {})
        (out / "model.safetensors").write_bytes(b"weights")
        files = {"config.json": 3, "model.safetensors": 7}
        write_json(out / "parity.json", {"stage": stage, "model": model.fingerprint, "files": files})

    monkeypatch.setattr(runner, "evaluate", lambda *arguments: [created.append("evaluation"), evaluate(*arguments)])
    monkeypatch.setattr(torch_export, "export", export)
    monkeypatch.setattr(page, "write_report", lambda workdir: workdir.path / "report" / "index.html")
    return created


@pytest.mark.slow
def test_an_evaluation_with_other_settings_is_repeated(tiny_copy: Path, finished: list[str]) -> None:
    stages.finish(tiny_config(), str(tiny_copy))
    assert finished == ["export"], "the evaluation exists"
    config, workdir, model = as_config(tiny_config()), Workdir(tiny_copy), load(tiny_copy)
    chunks = chunks_of(config, model, workdir, evaluation_identity(config, model, workdir, "test"), "test")[""]
    chunks.save([], [], False, ChunkScores(*[np.zeros((0, 0))] * 2, None, np.zeros((0, 4), int), [], [], []))
    (tiny_copy / "eval/chunks/of another pass").mkdir()
    stages.finish(tiny_config(), str(tiny_copy))
    assert finished == ["export"]
    assert [path.name for path in (tiny_copy / "eval/chunks").iterdir()] == ["of another pass"]
    for damage in (Path.unlink, lambda path: path.write_bytes(b"wei")):
        damage(tiny_copy / "export" / "model.safetensors")
        stages.finish(tiny_config(), str(tiny_copy))
    (tiny_copy / "export" / "config.json").write_text('{"edited": true}')
    stages.finish(tiny_config(), str(tiny_copy))
    assert finished == ["export"] * 3, "its weights were missing, then truncated"
    changed = tiny_config({"evaluate.samples": 8})
    run_stages(changed, str(tiny_copy), changed.stages)
    result = stages.finish(changed, str(tiny_copy))["evaluation"]
    assert finished == [*["export"] * 3, "evaluation"]
    assert {row["samples"] for row in result["budgets"].values()} == {8}


def test_an_evaluation_of_other_records_or_pictures_is_repeated(tiny_copy: Path, tmp_path: Path) -> None:
    write_records(tmp_path)
    data = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "data.test_fraction": 0.0}
    config, workdir = tiny_config({**data, "stages": ("full",)}), Workdir(tiny_copy)
    model, evaluated = load(tiny_copy), tiny_copy / "eval" / "test.json"

    def is_kept() -> bool:
        return stages.is_current(evaluated, evaluation_identity(config, model, workdir, "test"))

    assert not is_kept(), "the configuration uses generated data"
    evaluate(config, model, workdir)
    assert is_kept()
    for changed in ({"shade": 9}, {"answer": "b", "shade": 9}):
        write_records(tmp_path, **changed)
        assert not is_kept()
        evaluate(config, model, workdir)
        assert is_kept()
