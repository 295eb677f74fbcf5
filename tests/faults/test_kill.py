"""kill -9 at seeded moments of a whole `visor run`: a resumed run's results equal an uninterrupted one's, bit for bit.

Five chains of four kills: in each, one run is killed in the first stages, resumed, killed in the next ones, and so on,
up to evaluation, report and export. A moment is a fault point of one stage (`visor_jax.workdir.fault_points`), and in
every second chain a random time after it, when any thread may be doing anything.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.whole_run import array_digests, exported, results, visor

CHAINS, STEPS, SEED = 5, 4, 8
# Points of a trained stage by what they interrupt; "{step}" is any step. Those without a step happen once.
TRAINING = {
    "step": ("step:{step}", "dispatched:{step}"),
    "save": ("save_begin:{step}", "arrays_written:{step}", "gc:1"),
    "data and manifest": ("before_manifest:{step}", "before_commit:{step}"),
    "between stages": ("complete", ""),
}
SCORING = {"pass": ("score", "chunk:0", "chunk:1")}
PARTS = (
    {"base": TRAINING, "warmup": TRAINING},
    {"full": TRAINING, "search": SCORING},
    {"universal": TRAINING, "label": SCORING, "policy": TRAINING},
    {"eval": {**SCORING, "report": ("report",), "export": ("export", "export>report")}},
)


class Moment(NamedTuple):
    """When a run is killed: the fault point after the start of `stage`, `delay` seconds later."""

    stage: str
    kind: str
    point: str
    delay: float

    @property
    def environment(self) -> dict[str, str]:
        target = f"{self.stage}>{self.point}" if self.point else self.stage
        return {"VISOR_TEST_KILL_AT": target, "VISOR_TEST_SIGNAL": "SIGKILL", "VISOR_TEST_DELAY": str(self.delay)}


def moments(chain: int) -> list[Moment]:
    """Draws the four moments of a chain, in their order in the run."""
    rng, drawn = random.Random(f"{SEED}/{chain}"), list[Moment]()
    for part in PARTS:
        stage = rng.choice(sorted(part))
        kind = rng.choice(sorted(part[stage]))
        point = rng.choice(part[stage][kind]).format(step=rng.randint(1, STEPS))
        drawn.append(Moment(stage, kind, point, round(rng.uniform(0, 0.8), 2) if chain % 2 else 0.0))
    return drawn


def test_the_moments_cover_every_kind_of_work() -> None:
    drawn = [moment for chain in range(CHAINS) for moment in moments(chain)]
    assert len(drawn) == 20
    kinds, stages = {moment.kind for moment in drawn}, {moment.stage for moment in drawn}
    assert kinds == {*TRAINING, *SCORING, "report", "export"}, kinds
    assert len(stages) == 8, stages
    assert {("search", "pass"), ("label", "pass"), ("eval", "pass")} <= {(m.stage, m.kind) for m in drawn}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chain", range(CHAINS))
def test_a_killed_run_ends_like_an_uninterrupted_one(
    chain: int, uninterrupted: Path, compiled: str, tmp_path: Path
) -> None:
    command = "run", f"--config={uninterrupted}/tiny.py", f"--workdir={tmp_path}/run"
    for moment in moments(chain):
        status, err = visor(*command, compiled=compiled, **moment.environment)
        print(f"chain {chain}, {moment}: {status}")
        assert status == -9, (moment, err)
    status, err = visor(*command, compiled=compiled)
    assert status == 0, err
    whole = uninterrupted / "run"
    assert results(tmp_path / "run") == results(whole)
    assert exported(tmp_path / "run") == exported(whole)
    assert (tmp_path / "run/report/index.html").exists() and not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_random_times_until_it_is_complete_ends_alike(
    uninterrupted: Path, compiled: str, tmp_path: Path
) -> None:
    """Each start lives for a random number of seconds, long enough on average for one or two stages."""
    command = "run", f"--config={uninterrupted}/tiny.py", f"--workdir={tmp_path}/run"
    rng, statuses = random.Random(SEED), list[int]()
    while not statuses or statuses[-1] == -9:
        seconds = round(rng.uniform(4, 14) + len(statuses), 2)  # the later stages must fit in, also on a slow machine
        at = Moment("start", "", "", seconds).environment
        status, err = visor(*command, compiled=compiled, **at)
        print(f"killed after {seconds} s: {status}")
        statuses.append(status)
        assert status in (-9, 0) and len(statuses) < 60, err
        if (tmp_path / "run/export/parity.json").exists():
            status, err = visor(*command, compiled=compiled)
            assert status == 0, err
            break
    assert len(statuses) > 3, "the run was not interrupted"
    assert results(tmp_path / "run") == results(uninterrupted / "run")
    assert exported(tmp_path / "run") == exported(uninterrupted / "run")


@pytest.mark.slow
def test_an_import_that_is_killed_or_stopped_is_made_by_the_next_one(
    uninterrupted: Path, compiled: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = "import", f"--from={uninterrupted}/run/export", f"--workdir={run}", f"--config={uninterrupted}/tiny.py"
    for point in ("save_begin:0", "arrays_written:0", "before_manifest:0", "before_commit:0", "imported"):
        for name, expected in {"SIGKILL": -9, "SIGTERM": 143}.items():
            at = {"VISOR_TEST_KILL_AT": point, "VISOR_TEST_SIGNAL": name}
            assert visor(*command, compiled=compiled, **at)[0] == expected, (point, name)
            assert not (run / "policy/complete.json").exists()
    status, err = visor(*command, compiled=compiled)
    assert status == 0, err
    whole = {
        path: x for path, x in array_digests(uninterrupted / "run", "policy").items() if path.startswith("params/")
    }
    assert array_digests(run, "policy") == whole


def test_a_stage_and_an_evaluation_that_are_killed_and_resumed(tiny_run: Path, tiny_copy: Path, compiled: str) -> None:
    """The same in short: killed between data and manifest, and between two batches of the evaluation."""
    for name in ("policy", "eval"):
        shutil.rmtree(tiny_copy / name)
    here = f"--workdir={tiny_copy}"
    for moment in (Moment("policy", "", "before_manifest:4", 0.0), Moment("eval", "", "chunk:0", 0.0)):
        status, err = visor("run", here, compiled=compiled, **moment.environment)
        assert status == -9, (moment, err)
    status, err = visor("evaluate", here, compiled=compiled)
    assert status == 0, err
    assert results(tiny_copy) == results(tiny_run) and not leftovers(tiny_copy)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".partial", ".old"))]
