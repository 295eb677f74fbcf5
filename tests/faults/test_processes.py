"""Several processes of one run: they compute what one computes, and end together in bounded time when one is lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.whole_run import TRAINED, environment, steps_of, visor, without_times
from visor_jax.testing.processes import Ended, Processes, free_port
from visor_jax.workdir.metrics_log import read_rows

CONFIG = """
from visor_jax.testing import tiny_config
def get_config():
    return tiny_config({"train.checkpoint_every": 2, "train.learning_rate": 1e-4, "train.hang_seconds": 600.0,
                        "stage_overrides.policy.learning_rate": 1e-4, "data.batch_size": 8, "evaluate.batch_size": 4,
                        "evaluate.cache_gigabytes": 0.1},
                       steps=8)
"""
STEPS = 8
PACKED = [  # four pools of two rows; samples wait at each
    "--config.stage=full", "--config.stage_overrides.full.init_from=", "--config.data.pack_window=5",
    "--config.data.pool_rows=2", "--config.data.pool_tiles=4", "--config.data.visual_length=80",
]  # fmt: skip
SLOW = pytest.mark.slow
LIMIT = 1500.0  # seconds, for a whole command on a slow machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("processes") / "tiny.py"
    file.write_text(CONFIG)
    return file


def start(
    config: Path, run: Path, compiled: str, *more: str, command: str = "train", of_each: tuple[dict[str, str], ...] = ()
) -> Processes:
    """Starts two processes of two devices."""
    stage = ["--config.stage=base"] if command == "train" else []
    settings = {**environment(compiled), "VISOR_HEARTBEAT_SECONDS": "10"}
    arguments = [command, f"--config={config}", f"--workdir={run}", *stage, *more]
    return Processes(arguments, environment=settings, of_each=of_each)


def finish(processes: Processes) -> list[Ended]:
    with processes:
        return processes.wait(LIMIT)


@pytest.fixture(scope="module")
def undisturbed(config: Path, compiled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage, trained by two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = finish(start(config, run, compiled))
    assert [process.status for process in ended] == [0, 0], ended
    return run


def assert_resumes_equal(config: Path, run: Path, compiled: str, undisturbed: Path) -> None:
    ended = finish(start(config, run, compiled))
    assert [process.status for process in ended] == [0, 0], ended
    assert steps_of(run, "base") == steps_of(undisturbed, "base")
    assert not (run / "lock.json").exists()


def relative_difference(run: Path, other: Path, stage: str) -> float:
    """The largest relative difference of a loss; both must have trained on the same samples."""
    rows, others = (read_rows(path / stage / "metrics.jsonl") for path in (run, other))
    assert [row["sample_ids_sha256"] for row in rows] == [row["sample_ids_sha256"] for row in others]
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, others, strict=True))


def files_of(run: Path) -> list[str]:
    """The files of a run without the arrays of its checkpoints and its cache; all event files have one name."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    names = (name for name in names if not {"arrays", "features"} & {*name.parts})
    return sorted(str(name.parent / "events" if "tfevents" in name.name else name) for name in names)


# --- the same results -------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_trains(config: Path, compiled: str, tmp_path: Path) -> None:
    more = ("--config.train.steps=3",)
    ended = finish(start(config, tmp_path / "two", compiled, *more))
    assert [process.status for process in ended] == [0, 0], ended
    assert "base: step 3/3" in ended[0].output and "step 3/3" not in ended[1].output
    status, err = visor(
        "train", f"--config={config}", f"--workdir={tmp_path}/one", "--config.stage=base", *more, compiled=compiled
    )
    assert status == 0, err
    assert relative_difference(tmp_path / "two", tmp_path / "one", "base") <= 1e-5
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.fixture(scope="module")
def whole(config: Path, compiled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = finish(start(config, run, compiled, command="run"))
    assert [process.status for process in ended] == [0, 0], ended
    return run


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_whole_run_of_two_processes_equals_that_of_one(
    config: Path, compiled: str, whole: Path, tmp_path: Path
) -> None:
    status, err = visor("run", f"--config={config}", f"--workdir={tmp_path}/one", compiled=compiled)
    assert status == 0, err
    two, one = whole, tmp_path / "one"
    for stage in TRAINED:
        difference = relative_difference(two, one, stage)
        print(f"{stage}: largest relative difference of a loss {difference:.1e}")
        assert difference <= 1e-5
    assert files_of(two) == files_of(one)
    viable, other = (json.loads((run / "search/viable.json").read_text()) for run in (two, one))
    assert viable["viable"] == other["viable"] and viable["skipped"] == other["skipped"]
    budgets, other = (json.loads((run / "eval/test.json").read_text())["budgets"] for run in (two, one))
    assert budgets == other
    with np.load(two / "labels/labels.npz") as labels, np.load(one / "labels/labels.npz") as others:
        for name in ("label", "picture_index", "turn"):
            np.testing.assert_array_equal(labels[name], others[name])
        np.testing.assert_allclose(labels["log_likelihood"], others["log_likelihood"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_export_import_and_generate(
    config: Path, compiled: str, undisturbed: Path, tmp_path: Path
) -> None:
    export, imported, picture = tmp_path / "export", tmp_path / "imported", tmp_path / "picture.png"
    Image.new("RGB", (24, 24)).save(picture)
    for arguments in (
        ["export", f"--workdir={undisturbed}", f"--out={export}"],
        ["import", f"--config={config}", f"--workdir={imported}", f"--from={export}"],
        ["evaluate", f"--workdir={imported}", "--config.evaluate.samples=4", "--json"],
        ["generate", f"--workdir={imported}", f"--image={picture}", "--question=what", "--budget=full", "--json"],
    ):
        ended = finish(Processes(arguments, environment=environment(compiled)))
        assert [process.status for process in ended] == [0, 0], ended
        assert not {"{", "│"} & {*ended[1].output}, ended[1].output
    assert ended[0].output.count('"cache_bytes"') == 1
    assert (imported / "base/complete.json").exists() and not (imported / "lock.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_packed_data_are_trained_and_resumed_by_two_processes_and_by_one(
    config: Path, compiled: str, tmp_path: Path
) -> None:
    """Samples that wait at the pools of two processes are packed into the same rows by one."""
    for name in ("whole", "stopped"):
        at = {"VISOR_TEST_KILL_AT": "dispatched:3", "VISOR_TEST_SIGNAL": "SIGTERM"} if name == "stopped" else {}
        ended = finish(start(config, tmp_path / name, compiled, *PACKED, of_each=({}, at)))
        assert [process.status for process in ended] == [143 if at else 0] * 2, ended
    shutil.copytree(tmp_path / "stopped", tmp_path / "by one")
    ended = finish(start(config, tmp_path / "stopped", compiled, *PACKED))
    assert [process.status for process in ended] == [0, 0], ended
    assert "resumed after step" in ended[0].output
    assert steps_of(tmp_path / "stopped", "full") == steps_of(tmp_path / "whole", "full")
    for name in ("by one", "always one"):
        status, err = visor("train", f"--config={config}", f"--workdir={tmp_path / name}", *PACKED, compiled=compiled)
        assert status == 0 and ("resumed after step" in err) == (name == "by one"), err
        assert relative_difference(tmp_path / name, tmp_path / "whole", "full") <= 1e-5


@pytest.mark.parametrize(
    ("differs", "mine"),
    [
        ("seed", "sys.argv.append(f'--config.seed={10 + index}')"),
        pytest.param("--samples", "sys.argv[1:] = ['data', 'check', CONFIG, f'--samples={10 + index}']", marks=SLOW),
        pytest.param("train.keep", "sys.argv.append(f'--config.train.keep={10 + index}')", marks=SLOW),
        pytest.param("version", "processes.__version__ = f'{10 + index}'", marks=SLOW),
        pytest.param("commit", "provenance.git_commit = lambda: f'{10 + index}'", marks=SLOW),
        pytest.param("local devices", "os.environ['XLA_FLAGS'] += str(index)", marks=SLOW),  # 10 and 11
        pytest.param("command", "sys.argv[1] = ['train', 'run'][index]", marks=SLOW),
    ],
)  # fmt: skip
def test_a_process_that_was_started_otherwise_is_refused(
    config: Path, tmp_path: Path, compiled: str, differs: str, mine: str
) -> None:
    file = tmp_path / "started.py"
    file.write_text(f"""import os, sys
from visor_jax.commands import processes
from visor_jax.workdir import provenance
CONFIG, index = sys.argv[2], int(os.environ["JAX_PROCESS_ID"])
{mine}
from visor_jax.__main__ import main
sys.exit(main())""")
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path}/run"]
    with Processes(arguments, environment=environment(compiled), program=[str(file)], devices=1) as processes:
        ended = processes.wait(LIMIT)
    assert [process.status for process in ended] == [2, 2], ended
    values = ("run", "train") if differs == "command" else ("11", "10")
    message = "{}={} in process 1, {} in process 0: expected the same command, configuration, versions and devices"
    assert all(message.format(differs, *values) in each.output for each in ended), ended
    assert not (tmp_path / "run").exists()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("killed", [0, 1])
def test_both_end_when_one_is_killed_and_resume_equal(
    config: Path, compiled: str, undisturbed: Path, tmp_path: Path, killed: int
) -> None:
    of_each = tuple({"VISOR_TEST_KILL_AT": "dispatched:5"} if index == killed else {} for index in (0, 1))
    ended = finish(start(config, tmp_path / "run", compiled, of_each=of_each))
    print([process.status for process in ended])
    assert ended[killed].status == -signal.SIGKILL
    assert ended[1 - killed].status in (134, -signal.SIGABRT), ended[1 - killed].output
    assert_resumes_equal(config, tmp_path / "run", compiled, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("signaled", [0, 1])
def test_sigterm_to_one_saves_and_stops_both(
    config: Path, compiled: str, undisturbed: Path, tmp_path: Path, signaled: int
) -> None:
    at = {"VISOR_TEST_KILL_AT": "dispatched:3", "VISOR_TEST_SIGNAL": "SIGTERM"}
    of_each = tuple(at if index == signaled else {} for index in (0, 1))
    ended = finish(start(config, tmp_path / "run", compiled, of_each=of_each))
    assert [process.status for process in ended] == [143, 143], ended
    saved = len(read_rows(tmp_path / "run/base/metrics.jsonl"))
    assert 3 <= saved < STEPS and (tmp_path / f"run/base/checkpoints/{saved}/commit.json").exists()
    assert_resumes_equal(config, tmp_path / "run", compiled, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("disturbed", [{0}, {1}, {0, 1}], ids=["0", "1", "both"])
@pytest.mark.parametrize(("command", "folder"), [("search", "search"), ("label", "labels"), ("evaluate", "eval")])
def test_a_pass_that_is_stopped_and_killed_ends_equal(
    compiled: str, whole: Path, tmp_path: Path, command: str, folder: str, disturbed: set[int]
) -> None:
    """SIGTERM before the first chunk, SIGKILL after it, and SIGKILL between the result and the removal of chunks.

    Which process stores a picture's visual tokens first, and from a batch of how many pictures, differs with the time
    of the kill; so numbers are equal up to rounding.
    """
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(folder, "features", "export"))
    events = {"score": "SIGTERM"}
    events |= {f"chunk:{number}": "SIGKILL" for number in disturbed if len(disturbed) == 1}
    events |= {"result": "SIGKILL"} if disturbed == {0} else {}
    for point, name in events.items():
        at = {"VISOR_TEST_KILL_AT": point, "VISOR_TEST_SIGNAL": name}
        began = time.monotonic()
        ended = finish(in_pass(command, run, compiled, disturbed, at))
        print(f"{name} at {point}:", [process.status for process in ended], f"{time.monotonic() - began:.0f} s")
        if name == "SIGTERM":
            assert [process.status for process in ended] == [143, 143], ended
            for other in {0, 1} - disturbed:
                assert f"process {1 - other}: was stopped by SIGTERM; stopping" in ended[other].output, ended
        else:
            assert all((ended[x].status == -signal.SIGKILL) == (x in disturbed) for x in (0, 1)), ended
            assert all(ended[x].status in (134, -signal.SIGABRT) for x in {0, 1} - disturbed), ended
        assert (run / folder / "chunks").exists() or point == "score"
    ended = finish(in_pass(command, run, compiled))
    assert [process.status for process in ended] == [0, 0], ended
    assert results_of(run / folder) == rounded(results_of(whole / folder))
    assert not (run / folder / "chunks").exists() and not (run / "lock.json").exists()


def in_pass(
    command: str, run: Path, compiled: str, disturbed: Set[int] = frozenset(), at: Mapping[str, str] | None = None
) -> Processes:
    settings = {**environment(compiled), "VISOR_HEARTBEAT_SECONDS": "10"}
    of_each = [(at or {}) if index in disturbed else {} for index in (0, 1)]
    return Processes([command, f"--workdir={run}"], environment=settings, of_each=of_each)


def rounded(value: Any) -> Any:
    """Returns a JSON value whose fractions are equal to others that differ by rounding."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def results_of(folder: Path) -> dict[str, Any]:
    """Returns the content of a pass's result files, by name."""
    found: dict[str, Any] = {file.name: without_times(json.loads(file.read_text())) for file in folder.glob("*.json")}
    for file in folder.glob("*.npz"):
        with np.load(file) as arrays:
            found[file.name] = {name: arrays[name].tolist() for name in arrays.files}
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_process_that_hangs_ends_both(config: Path, compiled: str, undisturbed: Path, tmp_path: Path) -> None:
    of_each = ({}, {"VISOR_TEST_KILL_AT": "dispatched:4", "VISOR_TEST_SIGNAL": "hang"})
    began = time.monotonic()
    ended = finish(start(config, tmp_path / "run", compiled, "--config.train.hang_seconds=60", of_each=of_each))
    print([process.status for process in ended], f"{time.monotonic() - began:.0f} s")
    assert all(process.status in (134, -signal.SIGABRT) for process in ended), ended
    assert any("no progress for 60 s" in process.output for process in ended)
    assert_resumes_equal(config, tmp_path / "run", compiled, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_of_two_processes_continues_in_one(
    config: Path, compiled: str, undisturbed: Path, tmp_path: Path
) -> None:
    at = {"VISOR_TEST_KILL_AT": "dispatched:4", "VISOR_TEST_SIGNAL": "SIGTERM"}
    ended = finish(start(config, tmp_path / "run", compiled, of_each=(at, at)))
    assert [process.status for process in ended] == [143, 143], ended
    status, err = visor(
        "train", f"--config={config}", f"--workdir={tmp_path}/run", "--config.stage=base", compiled=compiled
    )
    assert status == 0 and "resumed after step" in err, err
    assert relative_difference(tmp_path / "run", undisturbed, "base") <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_devices_then_two_then_one(config: Path, compiled: str, undisturbed: Path, tmp_path: Path) -> None:
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path}/run", "--config.stage=base"]
    for devices, step in ((8, 3), (2, 6), (1, 0)):
        stop = {"VISOR_TEST_KILL_AT": f"dispatched:{step}", "VISOR_TEST_SIGNAL": "SIGTERM"} if step else {}
        with Processes(arguments, count=1, devices=devices, environment={**environment(compiled), **stop}) as one:
            (ended,) = one.wait(LIMIT)
        assert ended.status == (143 if step else 0), ended.output
    assert relative_difference(tmp_path / "run", undisturbed, "base") <= 1e-5


SKIPPING = """
from visor_jax.testing import tiny_config
def get_config():
    return tiny_config({"data.source": "llava", "data.root": "pictures", "data.path": "set.json", "stages": ("full",),
                        "stage_overrides.full.init_from": "", "data.test_fraction": 0.0, "data.batch_size": 8,
                        "data.max_skipped_fraction": 0.05}, steps=20)
"""


SKIPPED = r"samples could not be used \(set/missing_file \d+\), more than data.max_skipped_fraction=0.05 allows; "
SKIPPED += r"last: set \d+ in process 1, missing_file"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("missing", "status", "message"),
    [
        ("pictures", 1, SKIPPED),
        ("records", 2, r"data.path: cannot read pictures/set.json: No such file"),
        ("workdir", 2, r"lock.json was written by process 0 and is not there for this one; expected a folder that all"),
    ],
    ids=["pictures", "records", "workdir"],
)
def test_what_is_missing_on_the_machine_of_one_process_stops_both(
    compiled: str, tmp_path: Path, missing: str, status: int, message: str
) -> None:
    """Both say what is missing, process 0 also for which process."""
    talk = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(index), "image": f"{index % 7}.png", "conversations": talk} for index in range(60)]
    for process in (0, 1):
        root = tmp_path / str(process) / "pictures"
        root.mkdir(parents=True)
        (root / "set.json").write_text(json.dumps(records))
        for index in range(1 if process and missing == "pictures" else 7):
            Image.new("RGB", (48, 48), "red").save(root / f"{index}.png")
    if missing == "records":
        (tmp_path / "1/pictures/set.json").unlink()
    workdir = "run" if missing == "workdir" else tmp_path / "run"  # a folder on each machine
    (tmp_path / "tiny.py").write_text(SKIPPING)
    (tmp_path / "started.py").write_text(f"""import os, sys
os.chdir({str(tmp_path)!r} + "/" + os.environ["JAX_PROCESS_ID"])
from visor_jax.workdir import visible
visible.SECONDS = 3.0
from visor_jax.__main__ import main
sys.exit(main())""")
    arguments = ["train", f"--config={tmp_path}/tiny.py", f"--workdir={workdir}", "--config.stage=full"]
    program = [str(tmp_path / "started.py")]
    with Processes(arguments, environment=environment(compiled), program=program) as processes:
        ended = processes.wait(LIMIT)
    assert [process.status for process in ended] == [status] * 2, ended
    assert all(len(re.findall(message, process.output)) == 1 for process in ended), ended
    assert "process 1" in ended[0].output, ended


def test_a_wrong_request_ends_every_process_with_its_message(compiled: str, tmp_path: Path) -> None:
    settings = environment(compiled)
    with Processes(["train", f"--workdir={tmp_path}/none"], devices=1, environment=settings) as processes:
        ended = processes.wait(LIMIT)
    assert [process.status for process in ended] == [2, 2], ended
    assert all("config.json" in process.output for process in ended), ended


@pytest.mark.slow
def test_a_peer_that_never_comes_is_reported(compiled: str, tmp_path: Path, config: Path) -> None:
    """The address of a coordinator that does not exist: refused after the time limit for connections."""
    alone = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    status, err = visor(
        "train",
        f"--config={config}",
        f"--workdir={tmp_path}/run",
        "--config.stage=base",
        compiled=compiled,
        VISOR_CONNECT_SECONDS="10",
        **alone,
    )
    assert status == 2 and "process 0 does not answer within 10 s" in err, err
