"""The loop: a stage's files, and equal results after any interruption, signal, kill or bad step."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

import visor_jax.errors
from visor_jax.checkpoint.arrays import load
from visor_jax.checkpoint.manager import find_newest
from visor_jax.checkpoint.manifest import read_manifest
from visor_jax.checkpoint.restoring import restore_complete
from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture, from_dict
from visor_jax.errors import RequestError, RunError
from visor_jax.files.read_write import read_json
from visor_jax.model.visor import abstract_params
from visor_jax.scale.compiler_options import QUICK
from visor_jax.scale.mesh import configured_mesh
from visor_jax.testing import tiny_config
from visor_jax.train import loop
from visor_jax.train.faults import BadSteps
from visor_jax.train.loop import Run, record, train
from visor_jax.train.metrics import MetricsWriter, StageProgress
from visor_jax.train.objectives.base import Objective
from visor_jax.train.observer import MEASURED, Observer
from visor_jax.train.stage import Step
from visor_jax.train.state import start_folder
from visor_jax.train.step_cost import StepCost
from visor_jax.train.update import State, update_step
from visor_jax.tree import flatten, unflatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.goodput import Goodput
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(visor_jax.errors.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick")


def params_of(run: Path, stage: str) -> dict[str, np.ndarray]:
    workdir = Workdir(run)
    params = restore_complete(workdir, stage, abstract_params(architecture(from_dict(workdir.config()), stage)))
    return {path: np.asarray(x) for path, x in flatten(params).items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    different = [path for path in left if left[path].tobytes() != right[path].tobytes()]
    assert not different


def metric_rows(run: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the metrics without what is measured, such as wall times."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_rows(run / stage / "metrics.jsonl")]


def begin_again(run: Path, stage: str, **changes: Any) -> tuple[Any, Workdir]:
    """The stage as if it had never been run; free fields of the configuration may change."""
    shutil.rmtree(run / stage)
    workdir = Workdir(run)
    config: Any = ConfigDict(from_dict(workdir.config()).to_dict(), type_safe=False)
    config.train.update(changes)
    return config, workdir


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function that schedules SIGTERM at a fault point; "": at none."""

    def at(point: str) -> None:
        monkeypatch.setenv("VISOR_TEST_KILL_AT", point)
        monkeypatch.setenv("VISOR_TEST_SIGNAL", "SIGTERM")

    return at


# --- a stage's files --------------------------------------------------------------------------------------------------


def test_every_step_is_written_down_once(tiny_run: Path) -> None:
    for stage in ("base", "warmup", "full", "universal", "policy"):
        rows = metric_rows(tiny_run, stage)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)
        assert read_json(tiny_run / stage / "complete.json")["step"] == 4
    assert {row["budget"] for row in metric_rows(tiny_run, "full")} == {"full"}
    assert all(any(key.startswith("accuracy/") for key in row) for row in metric_rows(tiny_run, "full"))
    seconds = read_json(tiny_run / "goodput.json")
    assert {"init", "compile", "step", "data_wait", "save"} <= seconds.keys()
    for stage in ("base", "warmup", "full", "universal", "policy"):
        for row in read_rows(tiny_run / stage / "metrics.jsonl"):
            rates = [row[f"{name}_per_second"] for name in ("samples", "tokens", "visual_tokens", "tiles")]
            assert min(rates) > 0 and row["host_peak_memory_bytes"] > 2**20 and "mfu" not in row
            assert 0 <= row["data_wait_share"] <= 1 and 0 <= row["goodput"] <= 1 and row["bad_steps"] == 0
            assert f"loss/budget={row['budget']}" in row
    assert all(row["loss/source=almanac"] == row["loss"] for row in metric_rows(tiny_run, "full"))


def test_the_seconds_of_steps_that_overlap_are_counted_once(tmp_path: Path) -> None:
    def slowly(step: Step, values: Any) -> dict[str, Any]:
        time.sleep(0.02)
        return {}

    def nothing(*_: Any) -> Any:
        pytest.fail("only a finished step is written down here")

    cost = StepCost(architecture(tiny_config()), 3.0, 3.0)
    observer = Observer(cost, configured_mesh(tiny_config()), Goodput(tmp_path / "goodput.json"))
    run = object.__new__(Run)  # with what `record` reads
    vars(run).update(
        objective=Objective(nothing, nothing, slowly), bad_steps=BadSteps(1), observer=observer, log_row=print
    )
    metrics = dict.fromkeys(("loss", "gradient_norm", "learning_rate", "finite"), jnp.ones(()))
    with MetricsWriter(tmp_path, first_step=1) as writer, StageProgress("full", 3) as progress:
        began = time.perf_counter()
        for number in range(1, 4):  # all three dispatched at once
            step = Step(number, {}, (True,), "full", [], [])
            record((step, metrics, began), run, writer, progress)
        passed = time.perf_counter() - began
    seconds = [row["seconds"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert min(seconds) >= 0.02 and sum(seconds) <= passed


def test_a_complete_stage_is_left_as_it_is(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_objective", lambda *_: pytest.fail("nothing is to be done"))
    train(tiny_config(), "full", Workdir(tiny_run))


@pytest.mark.parametrize(
    ("stage", "start", "trains"),
    [("warmup", "base", "blocks/cross_attention/"), ("policy", "universal", "routing/")],
)
def test_what_is_frozen_stays_bit_for_bit(tiny_run: Path, stage: str, start: str, trains: str) -> None:
    before, after = params_of(tiny_run, start), params_of(tiny_run, stage)
    assert all(p.startswith((trains, "routing/")) for p in after.keys() ^ before.keys()), "the base is dense"
    assert_same(*({p: tree[p] for p in before if not p.startswith(trains)} for tree in (before, after)))
    changed = [p for p in after if p.startswith(trains) and (p not in before or (before[p] != after[p]).any())]
    assert changed


def test_routing_waits_for_its_own_stage(tiny_run: Path) -> None:
    first, last = params_of(tiny_run, "warmup"), params_of(tiny_run, "universal")
    first, last = ({p: x for p, x in tree.items() if p.startswith("routing/")} for tree in (first, last))
    assert first and not any(p.startswith("routing/") for p in params_of(tiny_run, "base"))
    assert_same(first, last)


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "at"), [("universal", 3), pytest.param("policy", 1, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_the_same_run(
    tiny_run: Path, tiny_copy: Path, signal_at: Callable[[str], None], stage: str, at: int
) -> None:
    config, workdir = begin_again(tiny_copy, stage, checkpoint_every=100)
    signal_at(f"dispatched:{at}")
    with pytest.raises(SystemExit) as stopped:
        train(config, stage, workdir)
    assert stopped.value.code == 143
    assert not workdir.stage(stage).is_complete() and len(metric_rows(tiny_copy, stage)) == at
    signal_at("")
    train(config, stage, workdir)
    assert metric_rows(tiny_copy, stage) == metric_rows(tiny_run, stage)
    assert_same(params_of(tiny_copy, stage), params_of(tiny_run, stage))


@pytest.mark.parametrize(
    "point",
    [
        "dispatched:4",
        "save_begin:4",
        "complete:4",
        *(pytest.param(point, marks=pytest.mark.slow) for point in ("step:4", "arrays_written:4")),
    ],
)
def test_a_signal_in_a_stages_end_completes_it_and_begins_no_other(
    tiny_copy: Path, signal_at: Callable[[str], None], point: str
) -> None:
    """In its last step, while that is saved, and before the stage is marked complete."""
    config, workdir = begin_again(tiny_copy, "policy")
    shutil.rmtree(tiny_copy / "full")
    signal_at(point)
    with pytest.raises(SystemExit) as stopped:
        run_stages(config, str(tiny_copy), ["policy", "full"])
    assert stopped.value.code == 143
    assert workdir.stage("policy").is_complete() and not (tiny_copy / "full").exists()
    signal_at("")
    assert run_stages(config, str(tiny_copy), ["policy"]) == {"stages": {"policy": 0.0}}


def in_a_process(run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `visor train` of the policy stage of `run` in a separate process."""
    main = "from visor_jax.__main__ import main\n"
    main += f"raise SystemExit(main(['train', '--workdir={run}', '--config.stage=policy']))"
    flags = " ".join(f"--{name}={str(x).lower()}" for name, x in QUICK.items())
    return subprocess.run(
        [sys.executable, "-c", main],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_sigterm_saves_and_exits_143(tiny_run: Path, tiny_copy: Path) -> None:
    config, workdir = begin_again(tiny_copy, "policy")
    done = in_a_process(tiny_copy, VISOR_TEST_KILL_AT="step:2", VISOR_TEST_SIGNAL="SIGTERM")
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM after step 2; saved" in done.stderr
    assert (tiny_copy / "policy" / "checkpoints" / "2").is_dir() and not workdir.stage("policy").is_complete()
    train(config, "policy", workdir)
    assert metric_rows(tiny_copy, "policy") == metric_rows(tiny_run, "policy")
    assert_same(params_of(tiny_copy, "policy"), params_of(tiny_run, "policy"))


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        ("step:4", "2"),
        pytest.param("before_commit:2", None, marks=pytest.mark.slow),
        pytest.param("arrays_written:4", "2", marks=pytest.mark.slow),
    ],
)
def test_kill_9_then_the_last_good_checkpoint_is_used(
    tiny_run: Path, tiny_copy: Path, caplog: pytest.LogCaptureFixture, place: str, saved: str | None
) -> None:
    config, workdir = begin_again(tiny_copy, "policy")
    done = in_a_process(tiny_copy, VISOR_TEST_KILL_AT=place)
    assert done.returncode == -9, done.stderr
    last = find_newest(workdir.stage("policy").path / "checkpoints").manifest
    # A save goes on in the background: a kill in a later step may still have cut it short, never another one's step.
    assert last is None or str(last.step) == saved
    caplog.set_level("INFO", logger="visor_jax")
    if place == "step:4":  # the seconds before the last save are not lost
        before, after = (read_json(run / "goodput.json") for run in (tiny_run, tiny_copy))
        assert after["compile"] > before["compile"] and after["save"] > before["save"]
    train(config, "policy", workdir)
    assert ("policy: resumed after step" in caplog.text) == (last is not None)
    assert metric_rows(tiny_copy, "policy") == metric_rows(tiny_run, "policy")
    assert_same(params_of(tiny_copy, "policy"), params_of(tiny_run, "policy"))


PACKED = {"data.pack_window": 5, "data.pool_rows": 2, "data.pool_tiles": 4, "data.visual_length": 80}


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["one per row", "packed"])
@pytest.mark.slow
def test_skip_counts_go_on_where_they_were(
    tmp_path: Path, signal_at: Callable[[str], None], packing: dict[str, int]
) -> None:
    """Rows of a run that was stopped and resumed tell the same counts; no record is written down twice."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    names = ["none.png" if index % 3 == 0 else "a.png" for index in range(24)]
    records = [{"id": str(index), "image": name, "conversations": talk} for index, name in enumerate(names)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": ("full",)}
    fractions = {"data.max_skipped_fraction": 0.9, "data.test_fraction": 0.0}
    config = tiny_config({**changes, **fractions, **packing, "stage_overrides.full.init_from": ""})
    runs = {name: Workdir(tmp_path / name) for name in ("whole", "stopped")}
    for workdir in runs.values():
        workdir.create()
    train(config, "full", runs["whole"])
    signal_at("dispatched:2")
    with pytest.raises(SystemExit):
        train(config, "full", runs["stopped"])
    signal_at("")
    config.data.workers = 1 if packing else 0  # another number of workers makes the same batches
    train(config, "full", runs["stopped"])
    whole, stopped = (metric_rows(workdir.path, "full") for workdir in runs.values())
    assert whole == stopped
    counts = [sum(row["skipped"].values()) for row in whole]
    assert counts == sorted(counts) and counts[-1] > 4
    assert all(name.endswith("/missing_file") for name in whole[-1]["skipped"])
    lines = (runs["stopped"].path / "data" / "skipped.jsonl").read_text().splitlines()
    assert len({json.loads(line)["index"] for line in lines}) == len(lines) <= 8
    saved = {name: arrays_at(workdir.path / "full" / "checkpoints" / "4") for name, workdir in runs.items()}
    assert all(saved["stopped"][path].tobytes() == array.tobytes() for path, array in saved["whole"].items())
    samples = [row["samples"] for row in whole]
    assert min(samples) > config.data.batch_size if packing else samples == [config.data.batch_size] * 4
    meta = read_manifest(runs["stopped"].path / "full" / "checkpoints" / "4").meta
    ((_, reason, count),) = meta["skips"]["skipped"]
    assert (reason, count) == ("missing_file", counts[-1])


# --- non-finite steps -------------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Puts a NaN into the batches of these steps."""
    make = loop.make_objective

    def make_spoilt(config: Any, stage: str, workdir: Workdir) -> Objective:
        objective = make(config, stage, workdir)

        def steps(done: int, total: int, position: Any = None):
            for step in objective.steps(done, total, position):
                bad = {**step.arrays, "label_weight": step.arrays["label_weight"] * np.float32(np.nan)}
                yield dataclasses.replace(step, arrays=bad) if step.number in numbers else step

        return dataclasses.replace(objective, steps=steps)

    monkeypatch.setattr(loop, "make_objective", make_spoilt)


def test_a_bad_step_is_counted_not_applied_and_not_saved(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, workdir = begin_again(tiny_copy, "policy", checkpoint_every=1, keep=4)
    spoil(monkeypatch, 2)
    train(config, "policy", workdir)
    saved = {step: arrays_at(tiny_copy / "policy" / "checkpoints" / str(step)) for step in (1, 3, 4)}
    assert not (tiny_copy / "policy" / "checkpoints" / "2").exists()
    assert any("opt_state" in path for path in saved[1])
    assert any(saved[3][path].tobytes() != saved[1][path].tobytes() for path in saved[3])
    losses = [row["loss"] for row in metric_rows(tiny_copy, "policy")]
    assert losses[1] is None and all(isinstance(loss, float) for loss in losses[:1] + losses[2:])
    assert "step 2: loss or gradient not finite, step not applied" in caplog.text
    manifest = read_manifest(tiny_copy / "policy" / "checkpoints" / "4")
    assert manifest.meta["bad_steps"] == {"in_row": 0, "total": 1}


def arrays_at(step: Path) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint: parameters and optimizer state."""
    saved = read_manifest(step).tree
    leaves = {name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in saved.items()}
    tree = load(step, saved, unflatten(leaves), {item: step / "arrays" / item for item in ("params", "opt_state")})
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("bad", "most", "message"),
    [
        ((1, 3, 4), 2, r"step 4: .* in 2 steps in a row .*samples: almanac/pages/train/0/\d+"),
        pytest.param(
            (1, 2, 3, 4),
            3,
            r"step 3: .* in 3 steps in a row .*samples: almanac/pages/train/0/\d+",
            marks=pytest.mark.slow,
        ),
        ((3, 4), 10, r"policy: .* in the last 2 steps, up to step 4; the stage is not complete; .*samples: almanac"),
    ],
)
def test_a_stop_over_bad_steps_stays_a_stop(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...], most: int, message: str
) -> None:
    """Also after restarts: nothing is saved within a run of bad steps, so the same steps repeat."""
    config, workdir = begin_again(tiny_copy, "policy", max_bad_steps=most, checkpoint_every=1, keep=9)
    spoil(monkeypatch, *bad)
    messages = []
    for _ in range(3):
        with pytest.raises(RunError, match=message) as stopped:
            train(config, "policy", workdir)
        messages.append(str(stopped.value))
        assert not workdir.stage("policy").is_complete()
        steps = {int(path.name) for path in (workdir.stage("policy").path / "checkpoints").iterdir()}
        assert not steps & set(bad)
    assert len(set(messages)) == 1


def test_sigterm_in_a_bad_row_saves_nothing_and_the_count_goes_on(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, signal_at: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    config, workdir = begin_again(tiny_copy, "policy", max_bad_steps=3, checkpoint_every=1)
    spoil(monkeypatch, 2, 3, 4)
    signal_at("dispatched:3")
    with pytest.raises(SystemExit) as stopped:
        train(config, "policy", workdir)
    assert stopped.value.code == 143 and "not saved, because it was not finite" in caplog.text
    signal_at("")
    with pytest.raises(RunError, match=r"step 4: .* in 3 steps in a row"):
        train(config, "policy", workdir)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_update_step_keeps_everything_where_only_a_gradient_is_not_finite(bad: float) -> None:
    def loss(params, batch, budget):
        return jnp.sum(jnp.sqrt(jnp.abs(params["w"]))) * 0 + batch["x"] * params["v"], {}

    tx, rate = optax.scale_by_adam(), jnp.float32(0.1)
    trainable = {"w": jnp.array([0.0, 1.0]), "v": jnp.float32(2.0)}  # sqrt has no gradient at 0
    state = State(trainable, {"z": jnp.zeros(2)}, tx.init(trainable))
    after, metrics = update_step(loss, tx, state, {"x": jnp.float32(3.0)}, jnp.array([True]), rate)
    assert not metrics["finite"] and np.isfinite(metrics["loss"])
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(now).tobytes()
    after, metrics = update_step(
        lambda p, b, _: (b["x"] * p["v"], {}), tx, state, {"x": jnp.float32(bad)}, jnp.array([True]), rate
    )
    assert not metrics["finite"] and float(after.trainable["v"]) == 2.0
    after, metrics = update_step(
        lambda p, b, _: (b["x"] * p["v"], {}), tx, state, {"x": jnp.float32(1)}, jnp.array([True]), rate
    )
    assert metrics["finite"] and float(after.trainable["v"]) == pytest.approx(2.0 - 0.1, rel=1e-3)


# --- where a stage starts ---------------------------------------------------------------------------------------------


def test_a_stage_does_not_start_from_one_that_was_stopped(tiny_copy: Path) -> None:
    config, workdir = begin_again(tiny_copy, "full")
    (tiny_copy / "warmup" / "complete.json").unlink()
    with pytest.raises(RequestError, match=r"init_from='warmup': .*warmup holds no complete stage"):
        train(config, "full", workdir)


def test_another_runs_stage_may_be_the_start(tiny_run: Path, tmp_path: Path) -> None:
    assert start_folder(str(tiny_run / "full"), Workdir(tmp_path)) == tiny_run / "full"
    with pytest.raises(RequestError, match="holds no complete stage"):
        start_folder("full", Workdir(tmp_path))


def test_an_unknown_trainable_pattern_is_refused(tiny_copy: Path) -> None:
    config, workdir = begin_again(tiny_copy, "full", trainable=("blocks/sell/",))
    config.stage_overrides.full.trainable = ("blocks/sell/",)
    with pytest.raises(RequestError, match=r"train\.trainable: 'blocks/sell/' matches no parameter"):
        train(config, "full", workdir)
