"""Search, label and evaluate are killed between chunks and started again: only missing chunks are computed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.adapt.label import label_stage
from visor_jax.adapt.search import search_stage
from visor_jax.budget import all_subsets
from visor_jax.data.questions import Failure, Place
from visor_jax.evaluate import features, scoring, visual_tokens
from visor_jax.evaluate.chunks import ChunkScores, ChunkStore
from visor_jax.evaluate.runner import evaluate
from visor_jax.files.read_write import read_json
from visor_jax.loading import load, load_stage
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

ROOT = Path(__file__).parents[2]
SAMPLES = {
    "search.samples": 16,
    "label.samples": 16,
    "evaluate.samples": 16,
    "evaluate.control_samples": 8,
    "evaluate.batch_size": 4,
}
CHUNKS, BUDGETS = 4, all_subsets(2)
CONTROL_CHUNKS = {"evaluate": 2}  # the questions without their pictures, asked after the others

PASSES: dict[str, tuple[Callable[[Any, Workdir], Any], str, tuple[str, ...]]] = {
    "search": (lambda c, w: search_stage(c, w, load_stage(w, "full")), "search", ("viable.json", "subsets.csv")),
    "label": (lambda c, w: label_stage(c, w, load_stage(w, "universal")), "labels", ("labels.json", "labels.npz")),
    "evaluate": (lambda c, w: evaluate(c, load(w.path), w), "eval", ("test.json",)),
}

CONFIGS = {name: tiny_config(SAMPLES | {"evaluate.cache_gigabytes": float(name == "label")}) for name in PASSES}

PROGRAM = """
import sys
from visor_jax.scale.compiler_options import QUICK
import functools, jax
jax.jit = functools.partial(jax.jit, compiler_options=QUICK)
from visor_jax.workdir.folder import Workdir
from tests.evaluate.test_chunks import CONFIGS, PASSES

PASSES[sys.argv[1]][0](CONFIGS[sys.argv[1]], Workdir(sys.argv[2]))
"""


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows with every chunk that is scored."""
    scored, score = list[int](), scoring.Scorer.score

    def counting(self: scoring.Scorer, chunk: Any) -> ChunkScores:
        scored.append(len(chunk.places))
        return score(self, chunk)

    monkeypatch.setattr(scoring.Scorer, "score", counting)
    return scored


def result(run: Path, name: str) -> list[Any]:
    _, folder, files = PASSES[name]
    return [read_json(run / folder / f) if f.endswith("json") else (run / folder / f).read_bytes() for f in files]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", ["label", *(pytest.param(name, marks=pytest.mark.slow) for name in ("search", "evaluate"))]
)
def test_a_killed_pass_computes_only_the_missing_chunks(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Programs that another test compiled with other options would round differently from the killed process's.
    visual_tokens.encoder.cache_clear()
    scoring.one_budget.cache_clear()
    features.before_slots.cache_clear()
    run, folder, _ = PASSES[name]
    config, whole, killed = CONFIGS[name], tmp_path / "whole", tmp_path / "killed"
    for copy in (whole, killed):
        shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("eval", "export"))
    run(config, Workdir(whole))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VISOR_TEST_KILL_AT": "chunk:1"}
    command = [sys.executable, "-c", PROGRAM, name, str(killed)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert ended.returncode == -9, ended.stderr[-2000:]
    assert len(list((killed / folder).glob("chunks/*/*.npz"))) == 2
    scored = counted(monkeypatch)
    run(config, Workdir(killed))
    assert scored == [4] * (CHUNKS - 2 + CONTROL_CHUNKS.get(name, 0))
    assert result(killed, name) == result(whole, name)
    assert not (killed / folder / "chunks").exists()


# --- the store --------------------------------------------------------------------------------------------------------


def scores_of(places: list[Place], routed: bool = True) -> ChunkScores:
    rng, count = np.random.default_rng(0), len(places)
    return ChunkScores(
        correct=rng.random((4, count)) < 0.5,
        log_likelihood=rng.normal(size=(4, count)).astype(np.float32),
        routes=rng.normal(size=(count, 4)).astype(np.float32) if routed else None,
        sizes=rng.integers(0, 9, (count, 4)),
        ids=[place.id for place in places],
        tasks=["a\0", ""][:count],
        failures=[Failure(7, 0, "broken_image", "no \ud800 picture", readable=False)],
    )


@pytest.fixture
def store(tiny_run: Path, tmp_path: Path) -> Callable[..., ChunkStore]:
    shutil.copytree(tiny_run / "full", tmp_path / "full")
    shutil.copytree(tiny_run / "universal", tmp_path / "universal")

    def store_of(
        identity: dict[str, Any] | None = None, stage: str = "full", with_features: bool = False
    ) -> ChunkStore:
        return ChunkStore(Workdir(tmp_path), "search", identity or {"seed": 0}, stage, with_features=with_features)

    return store_of


PLACES = [Place(3, 0), Place(3, 1), Place(7, 0)]


@pytest.mark.parametrize("routed", [False, True])
def test_scores_are_read_back_as_they_were(store: Callable[..., ChunkStore], routed: bool) -> None:
    scores = scores_of(PLACES[:2], routed)
    store().save(PLACES, BUDGETS, routed, scores)
    found = store().load(PLACES, BUDGETS, routed)
    assert found is not None
    for name in ("ids", "tasks", "failures"):
        assert getattr(found, name) == getattr(scores, name)
    for name in ("correct", "log_likelihood", "routes", "sizes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name))


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {"seed": 1}},
        {"stage": "universal"},
        {"with_features": True},
        {"places": PLACES[::-1]},
        {"places": PLACES[:2]},
        {"budgets": BUDGETS[::-1]},
        {"routed": False},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_stale_chunks_are_never_used(store: Callable[..., ChunkStore], changed: dict[str, Any]) -> None:
    store().save(PLACES, BUDGETS, True, scores_of(PLACES[:2]))
    chunk = {"places": PLACES, "budgets": BUDGETS, "routed": True}
    inputs = {name: value for name, value in changed.items() if name not in chunk}
    assert store().load(**chunk) is not None
    assert store(**inputs).load(**{**chunk, **{name: x for name, x in changed.items() if name in chunk}}) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "questions", "pickle"])
def test_damaged_chunks_are_computed_again(
    store: Callable[..., ChunkStore], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    scores = scores_of(PLACES[:2])
    if damage == "questions":
        scores = dataclasses.replace(scores, ids=["3/0", "4/0"])
    store().save(PLACES, BUDGETS, True, scores)
    (path,) = tmp_path.glob("search/chunks/*/*.npz")
    data = path.read_bytes()
    if damage == "pickle":
        np.savez(path, correct=np.array([{}], object))
        data = path.read_bytes()
    path.write_bytes({"cut": data[:-200], "empty": b""}.get(damage, data))
    assert store().load(PLACES, BUDGETS, True) is None
    assert "is computed again" in caplog.text
