"""Checkpoint folders are restored exactly or refused: damage of every kind, foreign states."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from visor_jax.checkpoint import manifest as manifests
from visor_jax.checkpoint.arrays import describe_tree, load
from visor_jax.checkpoint.manager import Checkpoints
from visor_jax.checkpoint.restoring import find_newest, restore_complete
from visor_jax.errors import RequestError, RunError
from visor_jax.files.read_write import write_json
from visor_jax.workdir.folder import Workdir

IDENTITY = {"stage": "full", "config": {"seed": 0}, "data": ""}


def make_params(step: int) -> dict[str, Any]:
    return {"w": jnp.arange(24.0).reshape(4, 6) + step, "gate": jnp.full((2,), step, jnp.bfloat16)}


def save(folder: Path, steps: tuple[int, ...] = (1, 2), **identity: Any) -> Path:
    with Checkpoints(folder, identity={**IDENTITY, **identity}, keep=9) as checkpoints:
        for step in steps:
            params = make_params(step)
            checkpoints.save(step, {"params": params, "opt_state": {"mu": params}}, {"step": step})
    return folder


def restore_latest(folder: Path) -> dict[str, Any] | None:
    """The parameters that a run would resume with; None if there is nothing to resume."""
    with Checkpoints(folder, identity=IDENTITY, keep=9) as checkpoints:
        step = checkpoints.latest()
        return None if step is None else checkpoints.restore(step, {"params": make_params(0)})["params"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid steps 1 and 2 of one stage; tests must not change them."""
    return save(tmp_path_factory.mktemp("saved") / "checkpoints")


# --- damage -----------------------------------------------------------------------------------------------------------


def file_of(step: Path, number: int) -> Path:
    """Returns the file `number` (modulo their count) of a step."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return files[number % len(files)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the path of a socket must be short
        server.bind(path.name)


def swap(left: Path, right: Path) -> None:
    left.rename(left.parent / "aside")
    right.rename(left)
    (left.parent / "aside").rename(right)


def reseal(step: Path, change: Callable[[dict[str, Any]], object], marker: dict[str, Any] | None = None) -> None:
    """Changes a manifest and updates its checksum, like a forger."""
    record = json.loads((step / "manifest.json").read_text())
    change(record)
    text = json.dumps(record).encode()
    (step / "manifest.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (step / "commit.json").write_text(json.dumps({"manifest_sha256": digest, **(marker or {})}))


def first_file(record: dict[str, Any]) -> dict[str, Any]:
    return record["files"][min(record["files"])]


OLDER, SAME, NONE, RUN_ERROR, REQUEST_ERROR = "step 1 is used", "step 2 is used", "no step", RunError, RequestError
NESTED = "[" * 100_000
DAMAGE: dict[str, tuple[Any, Callable[[Path], object]]] = {
    **{
        f"bit flipped in file {n}": (OLDER, lambda c, n=n: flip(file_of(c / "2", n))) for n in range(16)
    },
    **{
        f"file {n} truncated": (OLDER, lambda c, n=n: os.truncate(file_of(c / "2", n), 1)) for n in range(0, 12, 2)
    },
    **{f"file {n} removed": (OLDER, lambda c, n=n: file_of(c / "2", n).unlink()) for n in range(1, 12, 2)},
    "a newer step is empty": (SAME, lambda c: (c / "13").mkdir()),
    "a step of 250 digits": (SAME, lambda c: (c / ("9" * 250)).mkdir()),
    "a copy under a newer number": (SAME, lambda c: shutil.copytree(c / "2", c / "99999999999")),
    "the steps' folders swapped": (RUN_ERROR, lambda c: swap(c / "1", c / "2")),
    "the steps' arrays swapped": (RUN_ERROR, lambda c: swap(c / "1" / "arrays", c / "2" / "arrays")),
    "another step's manifest": (OLDER, lambda c: shutil.copy(c / "1" / "manifest.json", c / "2")),
    "another step's manifest and commit": (
        OLDER,
        lambda c: [shutil.copy(c / "1" / name, c / "2") for name in ("manifest.json", "commit.json")],
    ),
    "a newer step links to one": (SAME, lambda c: (c / "9").symlink_to(c / "2")),
    "a newer step links out": (SAME, lambda c: (c / "9").symlink_to("/etc")),
    "a file is a link": (
        OLDER,
        lambda c: replace(file_of(c / "2" / "arrays", 0), lambda path: path.symlink_to(file_of(c / "1" / "arrays", 0))),
    ),
    "a folder is a link": (
        OLDER,
        lambda c: replace(c / "2" / "arrays" / "opt_state", lambda p: p.symlink_to(c / "1" / "arrays" / "opt_state")),
    ),
    "a file too many": (OLDER, lambda c: (c / "2" / "arrays" / "more").write_text("x")),
    "a hidden file": (SAME, lambda c: (c / "2" / "arrays" / ".nfs0001").write_text("x")),
    "an empty folder": (SAME, lambda c: (c / "2" / "arrays" / "empty").mkdir()),
    "a FIFO too many": (OLDER, lambda c: os.mkfifo(c / "2" / "arrays" / "fifo")),
    "a FIFO for an array": (OLDER, lambda c: replace(file_of(c / "2" / "arrays", 0), os.mkfifo)),
    "a socket for an array": (OLDER, lambda c: replace(file_of(c / "2" / "arrays", 0), bind_socket)),
    "a device for an array": (
        OLDER, lambda c: replace(file_of(c / "2" / "arrays", 0), lambda path: path.symlink_to("/dev/zero"))
    ),
    "commit.json is a FIFO": (OLDER, lambda c: replace(c / "2" / "commit.json", os.mkfifo)),
    "commit.json is a folder": (OLDER, lambda c: replace(c / "2" / "commit.json", Path.mkdir)),
    "commit.json is nested": (OLDER, lambda c: (c / "2" / "commit.json").write_text(NESTED)),
    "commit.json is a list": (OLDER, lambda c: (c / "2" / "commit.json").write_text("[]")),
    "commit.json is huge": (OLDER, lambda c: os.truncate(c / "2" / "commit.json", 2**40)),
    "manifest.json is a FIFO": (OLDER, lambda c: replace(c / "2" / "manifest.json", os.mkfifo)),
    "manifest.json is huge": (OLDER, lambda c: os.truncate(c / "2" / "manifest.json", 2**40)),
    "re-sealed: nested": (OLDER, lambda c: seal_text(c / "2", NESTED)),
    "re-sealed: a number of 5000 digits": (OLDER, lambda c: seal_text(c / "2", '{"step": ' + "9" * 5000 + "}")),
    "re-sealed: a list": (OLDER, lambda c: seal_text(c / "2", "[]")),
    "re-sealed: a field more": (OLDER, lambda c: reseal(c / "2", lambda r: r.update(more=1))),
    "re-sealed: a field less": (OLDER, lambda c: reseal(c / "2", lambda r: r.pop("meta"))),
    "re-sealed: another step": (OLDER, lambda c: reseal(c / "2", lambda r: r.update(step=3))),
    "re-sealed: a step of text": (OLDER, lambda c: reseal(c / "2", lambda r: r.update(step="2"))),
    "re-sealed: a list of files": (OLDER, lambda c: reseal(c / "2", lambda r: r.update(files=[]))),
    "re-sealed: no files": (OLDER, lambda c: reseal(c / "2", lambda r: r.update(files={}))),
    "re-sealed: a file outside": (
        OLDER, lambda c: reseal(c / "2", lambda r: r["files"].update({"../1/commit.json": first_file(r)}))
    ),
    "re-sealed: another checksum": (OLDER, lambda c: reseal(c / "2", lambda r: first_file(r).update(sha256="0" * 64))),
    "re-sealed: a checksum of no text": (OLDER, lambda c: reseal(c / "2", lambda r: first_file(r).update(sha256=1))),
    "re-sealed: a size below 0": (OLDER, lambda c: reseal(c / "2", lambda r: first_file(r).update(size=-1))),
    "re-sealed: a shape of text": (
        OLDER, lambda c: reseal(c / "2", lambda r: r["tree"].update({"params/w": [["4"], "float32"]}))
    ),
    "re-sealed: items outside": (OLDER, lambda c: reseal(c / "2", lambda r: r["items"].update(params="../1/arrays"))),
    "re-sealed: an item without a folder": (OLDER, lambda c: reseal(c / "2", lambda r: r["items"].pop("params"))),
    "re-sealed: an unknown format": (REQUEST_ERROR, lambda c: reseal(c / "2", lambda r: r.update(format=99))),
    "a marker with more in it": (SAME, lambda c: reseal(c / "2", lambda r: None, {"more": 1})),
    "every step gone": (NONE, lambda c: [shutil.rmtree(c / step) for step in ("1", "2")]),
    "the folder gone": (NONE, shutil.rmtree),
}  # fmt: skip


def seal_text(step: Path, text: str) -> None:
    (step / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (step / "commit.json").write_text(json.dumps({"manifest_sha256": digest}))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_never_loaded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The restored step equals the saved one exactly; otherwise an error names the damage."""
    expected, damage = DAMAGE[name]
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    damage(folder)
    if expected == NONE:
        assert restore_latest(folder) is None
        return
    if expected not in (OLDER, SAME):
        with pytest.raises(expected):
            restore_latest(folder)
        return
    actual = find_newest(folder)
    assert actual.manifest is not None and actual.manifest.step == (1 if expected == OLDER else 2), actual
    assert (2 in dict(actual.skipped)) == (expected == OLDER)


def test_the_older_step_that_is_used_is_what_was_saved_as_it(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    flip(folder / "2" / "manifest.json")
    restored = restore_latest(folder)
    assert restored is not None
    for name, array in make_params(1).items():
        np.testing.assert_array_equal(restored[name], array)


# --- a complete stage is the step that complete.json names ------------------------------------------------------------

CONFIG = {
    "seed": 0,
    "data": {"source": "llava", "root": "", "path": ""},
    "train": {"learning_rate": 1e-3, "init_from": "", "budgets": "full", "objective": "answer"},
    "stage_overrides": {"full": {}, "universal": {"budgets": "viable"}, "policy": {"objective": "policy"}},
    "search": {"samples": 4},
}


def make_run(path: Path, records: str = "[]", **changes: Any) -> Workdir:
    """An untrained run whose stages full, universal and policy are complete, each with steps 1 and 2."""
    path.mkdir()
    (path / "train.json").write_text(records)
    config = {**CONFIG, **changes, "data": {"source": "llava", "root": str(path), "path": "train.json"}}
    workdir = Workdir(path)
    workdir.claim(config)
    workdir.claim_data(config)
    write_json(path / "search" / "viable.json", {"num_slots": 1, "viable": ["0", "1"]})
    for stage in ("full", "universal", "policy"):
        save(workdir.stage(stage).path / "checkpoints", **workdir.identity(config, stage))
        workdir.stage(stage).mark_complete({"step": 2})
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that differ in one property each; tests must not change them."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run")
    make_run(folder / "again")
    make_run(folder / "other_seed", seed=1)
    make_run(folder / "other_data", records="[{}]")
    make_run(folder / "other_rate", train={**CONFIG["train"], "learning_rate": 1.0})
    return folder


def take(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def forge_config(run: Path, **fields: Any) -> None:
    edit(run / "config.json", config={**json.loads((run / "config.json").read_text())["config"], **fields})


NOT_COMPLETE = {
    "": "not valid JSON",
    "[]": "step=null: expected a whole number",
    '{"step": -1}': "step=-1: expected",
    '{"step": "2"}': 'step="2": expected',
    '{"step": true}': "step=true: expected",
    '{"step": 2e0}': "step=2.0: expected",
    '{"step": 9007199254740993}': "step=9007199254740993: expected",
    '{"step": ' + "9" * 5000 + "}": "not valid JSON",
    '{"step": 2, "manifest_sha256": []}': "manifest_sha256=.*expected text",
    NESTED: "nested too deeply",
}
NAMED, ANOTHER = "is the step that policy/complete.json names, and cannot be used", "another state than the one"
FOREIGN: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "the last checkpoint is damaged": (
        RunError, f"{NAMED}: .*checksum", lambda r: flip(largest(r / "run/policy/checkpoints/2/arrays/params"))
    ),
    "the last checkpoint is gone": (RunError, NAMED, lambda r: shutil.rmtree(r / "run/policy/checkpoints/2")),
    "every checkpoint is gone": (RunError, NAMED, lambda r: shutil.rmtree(r / "run/policy/checkpoints")),
    "an older step is named": (RequestError, ANOTHER, lambda r: edit(r / "run/policy/complete.json", step=1)),
    "an older step is named, without its checksum": (
        RequestError, ANOTHER, lambda r: write_json(r / "run/policy/complete.json", {"step": 1})
    ),
    "another stage's checkpoints": (
        RequestError, ANOTHER, lambda r: take(r / "run/universal/checkpoints", r / "run/policy/checkpoints")
    ),
    "checkpoints of a run of the same settings": (
        RequestError, ANOTHER, lambda r: take(r / "again/policy/checkpoints", r / "run/policy/checkpoints")
    ),
    "another stage": (
        RequestError, 'stage is "universal" there and "policy" here',
        lambda r: take(r / "run/universal", r / "run/policy"),
    ),
    "another seed": (RequestError, "seed is 1 there and 0", lambda r: take(r / "other_seed/policy", r / "run/policy")),
    "other data": (RequestError, "data is .* there", lambda r: take(r / "other_data/policy", r / "run/policy")),
    "another learning rate": (
        RequestError, "learning_rate is 1.0 there and 0.001 here",
        lambda r: take(r / "other_rate/policy", r / "run/policy"),
    ),
    "other viable budgets": (
        RequestError, r'viable is \["0", "1"\] there and \["1"\] here',
        lambda r: write_json(r / "run/search/viable.json", {"num_slots": 1, "viable": ["1"]}),
    ),
    "another configuration": (RequestError, "seed is 0 there and 2 here", lambda r: forge_config(r / "run", seed=2)),
    "complete.json is a FIFO": (
        RequestError, "Not a regular file", lambda r: replace(r / "run/policy/complete.json", os.mkfifo)
    ),
    **{
        f"complete.json: {text[:30]}": (
            RequestError, message, lambda r, text=text: (r / "run/policy/complete.json").write_text(text)
        )
        for text, message in NOT_COMPLETE.items()
    },
}  # fmt: skip


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda path: path.stat().st_size)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_complete_stage_is_its_own_last_step_or_an_error(runs: Path, tmp_path: Path, name: str) -> None:
    """Earlier versions loaded each of these as the stage's result, silently or with a warning."""
    kind, message, change = FOREIGN[name]
    copy = shutil.copytree(runs, tmp_path / "runs")
    workdir = Workdir(copy / "run")
    np.testing.assert_array_equal(restore_complete(workdir, "policy", make_params(0))["w"], make_params(2)["w"])
    change(copy)
    with pytest.raises(kind, match=message):
        restore_complete(workdir, "policy", make_params(0))


def test_a_run_is_read_where_its_data_are_not(runs: Path, tmp_path: Path) -> None:
    """The workdir was copied to another machine without some earlier stages."""
    shutil.copytree(runs / "run", tmp_path / "run", ignore=shutil.ignore_patterns("train.json", "full", "universal"))
    restored = restore_complete(Workdir(tmp_path / "run"), "policy", make_params(0))
    np.testing.assert_array_equal(restored["w"], make_params(2)["w"])


def test_a_stage_that_an_earlier_version_completed_is_read(runs: Path, tmp_path: Path) -> None:
    """Its complete.json has only the step, and its identity has fewer fields than today's."""
    workdir = Workdir(shutil.copytree(runs / "run", tmp_path / "run"))
    step = workdir.path / "policy" / "checkpoints" / "2"
    reseal(step, lambda record: [record["identity"].pop(name) for name in ("inputs", "pictures")])
    write_json(workdir.path / "policy" / "complete.json", {"step": 2})
    np.testing.assert_array_equal(restore_complete(workdir, "policy", make_params(0))["w"], make_params(2)["w"])


# --- parameters alone -------------------------------------------------------------------------------------------------


def test_loading_parameters_reads_nothing_of_the_optimizer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints") / "2"
    read: dict[str, int] = {}
    checksum = manifests._checksum

    def counted(path: Path, **settings: Any) -> tuple[int, str]:
        size, digest = checksum(path, **settings)
        read[path.relative_to(folder).as_posix()] = size
        return size, digest

    monkeypatch.setattr(manifests, "_checksum", counted)
    manifest = manifests.examine(folder, ("params",))
    optimizer = {path.relative_to(folder).as_posix() for path in files(folder / "arrays" / "opt_state")}
    assert read == {name: file["size"] for name, file in manifest.files.items() if name not in optimizer}
    assert sum(manifest.files[name]["size"] for name in optimizer) > 0.4 * sum(
        f["size"] for f in manifest.files.values()
    )
    flip(largest(folder / "arrays" / "opt_state"))
    place = {"params": folder / manifest.items["params"]}
    arrays = load(folder, manifest.tree, {"params": jax.eval_shape(lambda: make_params(0))}, place)["params"]
    np.testing.assert_array_equal(arrays["w"], make_params(2)["w"])
    assert manifests.examine(folder, ("params",)) == manifest
    with pytest.raises(manifests.Damaged, match="opt_state"):
        manifests.examine(folder)


def test_steps_whose_items_share_files_still_load(saved: Path, tmp_path: Path) -> None:
    """Format 1, of versions before 0.2: one Orbax folder, a manifest without items."""
    step = tmp_path / "checkpoints" / "1"
    state = {"params": make_params(1), "opt_state": {"mu": make_params(1)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(str(step / "arrays"), args=ocp.args.PyTreeSave(state))
    manifests.seal(step, 1, identity=IDENTITY, meta={"step": 1}, tree=describe_tree(state), items={})
    reseal(step, lambda record: [record.pop("items"), record.update(format=1)])
    restored = restore_latest(step.parent)
    assert restored is not None
    np.testing.assert_array_equal(restored["w"], make_params(1)["w"])
    with Checkpoints(step.parent, identity=IDENTITY, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
    np.testing.assert_array_equal(restored["opt_state"]["mu"]["w"], make_params(1)["w"])
    flip(largest(step / "arrays"))
    with pytest.raises(RunError, match="no step can be trusted"):
        restore_latest(step.parent)


@pytest.mark.parametrize("used", [False, True])
def test_an_average_is_read_where_it_is_used_and_only_there(tmp_path: Path, used: bool) -> None:
    workdir, params = Workdir(tmp_path), make_params(1)
    folder = workdir.stage("full")
    meta = {"step": 1, **({"weights": "ema"} if used else {})}
    with Checkpoints(folder.path / "checkpoints", identity=IDENTITY, keep=1) as checkpoints:
        checkpoints.save(1, {"params": params, "ema": {"w": params["w"] + 0.5}}, meta, wait=True)
    folder.mark_complete({"step": 1})
    shapes = jax.eval_shape(lambda: params)
    restored = restore_complete(workdir, "full", shapes)
    np.testing.assert_array_equal(restored["w"], params["w"] + (0.5 if used else 0.0))
    np.testing.assert_array_equal(restored["gate"], params["gate"])
    flip(largest(folder.path / "checkpoints" / "1" / "arrays" / "ema"))
    if not used:
        restore_complete(workdir, "full", shapes)
        return
    with pytest.raises(RunError, match="cannot be used"):
        restore_complete(workdir, "full", shapes)
