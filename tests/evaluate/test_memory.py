"""Passes over data hold a bounded number of pictures, for any number of questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.adapt.label import label_stage
from visor_jax.adapt.search import search_stage
from visor_jax.data import questions
from visor_jax.data.almanac.draw import Canvas
from visor_jax.evaluate.runner import evaluate
from visor_jax.files.read_write import read_json, write_json
from visor_jax.loading import load, load_stage
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.workdir.folder import Workdir

COUNT = 160
CONFIG = {"search.samples": COUNT, "label.samples": COUNT, "evaluate.samples": COUNT}


class Alive:
    """Counts the arrays returned by a function that are alive at the same time, at most."""

    def __init__(self) -> None:
        self.created, self.most = 0, 0
        self._held: list[weakref.ref[np.ndarray]] = []
        self._lock = threading.Lock()

    def watch(self, function: Callable[..., Any], part: Callable[[Any], np.ndarray]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            with self._lock:
                self.created += 1
                self._held = [ref for ref in self._held if ref() is not None]
                self._held.append(weakref.ref(part(result)))
                self.most = max(self.most, len(self._held))
            return result

        return watched


def train_policy(config: Any, workdir: Workdir) -> None:
    record = read_json(workdir.path / "config.json")
    record["config"]["label"]["samples"] = config.label.samples  # part of the identity of the labels
    write_json(workdir.path / "config.json", record)
    label_stage(config, workdir, load_stage(workdir, "universal"))
    for step in make_objective(config, "policy", workdir).steps(0, 40):
        assert step.number


PASSES: dict[str, Callable[[Any, Workdir], Any]] = {
    "search": lambda config, workdir: search_stage(config, workdir, load_stage(workdir, "full")),
    "label": lambda config, workdir: label_stage(config, workdir, load_stage(workdir, "universal")),
    "policy": train_policy,
    "evaluate": lambda config, workdir: evaluate(config, load(workdir.path), workdir),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", ["search", *(pytest.param(name, marks=pytest.mark.slow) for name in ("label", "policy", "evaluate"))]
)
def test_few_pictures_and_tiles_are_held_at_a_time(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config, workdir = tiny_config(CONFIG), Workdir(tiny_copy)
    pictures, tiles = Alive(), Alive()
    monkeypatch.setattr(Canvas, "image", pictures.watch(Canvas.image, lambda image: image))
    monkeypatch.setattr(
        questions, "encode_example", tiles.watch(questions.encode_example, lambda example: example.tiles)
    )
    monkeypatch.setattr("visor_jax.train.objectives.policy.KEPT_BYTES", 0)
    PASSES[name](config, workdir)
    batch = config.evaluate.batch_size
    assert tiles.created >= COUNT and pictures.created >= 40
    # One current batch, two prefetched, one per thread, and the samples cached by index.
    assert pictures.most <= 3 * batch + 2 * questions.READ_THREADS + questions.RECENT < COUNT / 2
    assert tiles.most <= 3 * batch + 4 * questions.READ_THREADS < COUNT / 2


# --- bytes ------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, re, sys
from pathlib import Path
import numpy as np
from visor_jax.testing import tiny_config
from visor_jax.train.objectives.policy import LabeledExamples
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels
from tests.evaluate.test_memory import PASSES

name, path, data = sys.argv[1:]
changes = {"data.source": "llava", "data.root": data, "data.path": "set.json", "data.test_fraction": 0.0}
peaks = []
for count in (200, 2000):
    counts = {f"{part}.samples": count for part in ("search", "label", "evaluate")}
    config, workdir = tiny_config({**changes, **counts, "stages": ("full",)}), Workdir(path)
    if name == "search":  # its result would have other data than the workdir's
        (Path(path) / "search" / "viable.json").unlink(missing_ok=True)
    if name == "policy":
        table = np.zeros((count, 2))
        index = np.arange(count)
        labels = Labels([(False, False), (True, True)], index % 2, table, index, 0 * index)
        examples = LabeledExamples(config, labels)
        for row in range(count):
            examples.batch(np.array([row]))
    else:
        PASSES[name](config, workdir)
    # Not getrusage: it reports the peak of the parent process if that is larger.
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_2000_pictures_of_two_megapixels_take_no_more_memory_than_200(
    tiny_copy: Path, tmp_path: Path, name: str
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (125, 160, 3), np.uint8))
    small.resize((1600, 1250)).save(tmp_path / "picture.jpg", quality=80)
    talk = [{"from": "human", "value": "<image>\nWhich letter?"}, {"from": "gpt", "value": "A"}]
    records = [{"id": str(number), "image": "picture.jpg", "conversations": talk} for number in range(2000)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", PROGRAM, name, str(tiny_copy), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-2000:]
    few, many = json.loads(ended.stdout.splitlines()[-1])
    print(f"{name}: peak {few:.0f} MB at 200 samples, {many:.0f} MB at 2,000")
    assert many - few < 200
