"""Features: the tower runs once per sample, budget-independent layers once per question, also over several passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from visor_jax.adapt.label import label_stage
from visor_jax.adapt.search import search_stage
from visor_jax.architecture import Architecture
from visor_jax.config import as_config
from visor_jax.data.almanac.exercises import EXERCISES
from visor_jax.data.questions import label_questions
from visor_jax.errors import RequestError, RunError
from visor_jax.evaluate import features
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.runner import evaluate
from visor_jax.evaluate.scoring import Scores, score
from visor_jax.files.read_write import read_json
from visor_jax.loading import Visor, load, load_stage
from visor_jax.scale.mesh import build_mesh
from visor_jax.testing import tiny_config
from visor_jax.workdir import visible
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")
CACHED = {"evaluate.cache_gigabytes": 1.0}
MESH = build_mesh(1, -1, 1)


class Calls:
    """Counts the rows that go through the tower and through the budget-independent layers, padding included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tower, self.shared = 0, 0
        visual_tokens, before_slots = features.visual_tokens, features.before_slots

        def encode(params: Any, arrays: Any, *others: Any) -> Any:
            self.tower += len(arrays["tiles"])
            return visual_tokens(params, arrays, *others)

        def counting(arch: Architecture) -> Callable:
            def text(params: Any, visual: Any, batch: Any) -> Any:
                self.shared += len(visual)
                return before_slots(arch)(params, visual, batch)

            return text

        monkeypatch.setattr(features, "visual_tokens", encode)
        monkeypatch.setattr(features, "before_slots", counting)

    def taken(self) -> tuple[int, int]:
        """Returns (tower, shared) since the last call."""
        counts = self.tower, self.shared
        self.tower = self.shared = 0
        return counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Visor:
    return load(tiny_run)


def scored(model: Visor, store: FeatureStore | None, count: int = 12, size: int = 8, **options: Any) -> Scores:
    """Scores questions of three tasks, so that a picture has several."""
    without = (*[*EXERCISES["pages"].weights][3:], "read")
    batches = label_questions(tiny_config({"label.samples": count, "label.without": without})).batches(size)
    budgets = options.pop("budgets", [(False, False), (True, True)])
    return score(model.params, batches, budgets, model.arch, mesh=MESH, features=store, **options)


def assert_same(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(one.correct, other.correct)
    np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=0, atol=tolerance)
    assert (one.routes is None) == (other.routes is None)
    if one.routes is not None and other.routes is not None:
        np.testing.assert_allclose(one.routes, other.routes, rtol=0, atol=tolerance)
    assert one.ids == other.ids and one.num_tiles.tolist() == other.num_tiles.tolist()


def rows(new: int) -> int:
    """Returns the number of rows of a program that runs on `new` samples."""
    return 2 ** (new - 1).bit_length() if new else 0


def rows_of_pictures(ids: list[str], size: int) -> int:
    """Returns the number of rows of the tower, for questions of which several are about one picture."""
    pictures, total, seen = [id.split("/")[0] for id in ids], 0, set[str]()
    assert len(set(pictures)) < len(ids)
    for start in range(0, len(ids), size):
        new = {*pictures[start : start + size]} - seen
        total += rows(len(new))
        seen |= new
    return total


def test_a_second_pass_runs_neither_tower_nor_shared_layers(model: Visor, tmp_path: Path, calls: Calls) -> None:
    without = scored(model, None, routed=True)
    first = scored(model, FeatureStore(tmp_path, 10**9), routed=True)
    assert_same(without, first, 1e-5)
    assert calls.taken() == (rows_of_pictures(first.ids, 8), 8 + rows(len(first.ids) - 8))
    assert_same(scored(model, FeatureStore(tmp_path, 10**9), routed=True), first)
    assert calls.taken() == (0, 0)
    other = scored(model, FeatureStore(tmp_path, 10**9), size=4, budgets=[(True, False)])
    assert calls.taken() == (0, 0) and other.ids == first.ids, "other budgets and batches"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_dtype_is_read_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    tensors = {"a": np.linspace(-3, 3, 12).reshape(3, 4).astype(dtype), "none": np.zeros((0, 4), dtype)}
    assert FeatureStore(tmp_path, 10**9).write("owner", tensors)
    found = FeatureStore(tmp_path, 10**9).read("owner", ["none", "a", "absent"])
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and (found[name] == x).all()


@pytest.mark.slow
def test_passes_of_a_run_share_features(tiny_copy: Path, calls: Calls) -> None:
    """The same results as without; evaluating twice, or resuming, encodes nothing; another stage's tower does."""
    config, workdir = tiny_config(CACHED), Workdir(tiny_copy)
    before = read_json(tiny_copy / "eval" / "test.json")
    viable = read_json(tiny_copy / "search" / "viable.json")["viable"]
    evaluate(config, load(workdir.path), workdir)
    assert calls.taken() != (0, 0)
    after = read_json(tiny_copy / "eval" / "test.json")
    assert after["identity"] == before["identity"]
    assert {n: row["tasks"] for n, row in after["budgets"].items()} == {
        n: row["tasks"] for n, row in before["budgets"].items()
    }
    evaluate(config, load(workdir.path), workdir, budgets=["full"], name="partial")
    assert calls.taken() == (0, 0)
    search_stage(config, workdir, load_stage(workdir, "full"))
    assert read_json(tiny_copy / "search" / "viable.json")["viable"] == viable
    assert calls.taken()[0] > 0, "parameters of another stage"
    search_stage(config, workdir, load_stage(workdir, "full"))
    assert calls.taken() == (0, 0)
    label_stage(config, workdir, load_stage(workdir, "universal"))
    assert calls.taken()[0] > 0
    label_stage(config, workdir, load_stage(workdir, "universal"))
    assert calls.taken() == (0, 0)


# --- the bound --------------------------------------------------------------------------------------------------------


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_when_the_bound_is_reached_nothing_more_is_stored(
    model: Visor, tmp_path: Path, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    scored(model, FeatureStore(tmp_path, 10**9), size=4)
    whole = bytes_below(tmp_path)
    calls.taken()
    bounded = tmp_path / "bounded"
    first = scored(model, FeatureStore(bounded, whole // 2), size=4)
    assert 0 < bytes_below(bounded) <= whole // 2
    assert caplog.text.count("cache_gigabytes") == 1, "one warning"
    complete = calls.taken()
    assert_same(scored(model, FeatureStore(bounded, whole // 2), size=4), first)
    again = calls.taken()
    assert 0 < again[0] < complete[0], "what is stored is read, the rest computed"


def test_features_of_other_parameters_make_room(tmp_path: Path) -> None:
    tensors = {"a": np.ones((8, 32), np.float32)}
    store = FeatureStore(tmp_path, 2500)
    assert store.write("old", tensors) and store.write("new", tensors)
    later = FeatureStore(tmp_path, 2500)
    assert later.read("new", ["a"]).keys() == {"a"}
    assert later.write("newest", tensors), "after `old` was removed"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "newest"}
    assert not later.write("newest", {"b": tensors["a"]}), "those that this pass uses stay"


def test_damaged_features_are_computed_again(model: Visor, tmp_path: Path, calls: Calls, caplog: Any) -> None:
    first = scored(model, FeatureStore(tmp_path, 10**9), count=4)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    calls.taken()
    assert_same(scored(model, FeatureStore(tmp_path, 10**9), count=4), first)
    assert calls.taken()[0] > 0 and "damaged, removed" in caplog.text


class Bucket:
    def __fspath__(self) -> str:
        return "gs://bucket/run"


def test_a_bucket_has_no_features() -> None:
    config = as_config(tiny_config(CACHED))
    workdir: Any = SimpleNamespace(path=Bucket())
    with pytest.raises(RequestError, match=r"evaluate\.cache_gigabytes=1: .*local"):
        FeatureStore.of(config, workdir)
    assert FeatureStore.of(as_config(tiny_config()), workdir) is None


def test_a_file_of_another_process_that_never_appears_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible, "SECONDS", 0.0)
    with pytest.raises(RunError, match=r"owner/b\.safetensors: another process has written it, and it is not there"):
        FeatureStore(tmp_path, 1000).refresh("owner", {"b.safetensors"})
