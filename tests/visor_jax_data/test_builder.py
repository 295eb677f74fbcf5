"""The builder `visor_jax_data`: what it stores comes back as the same batches, and what it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import setuptools
import tensorflow_datasets as tfds
from PIL import Image

from visor_jax.config import Config, as_config, default_config
from visor_jax.data.fingerprint import fingerprint_of_split
from visor_jax.data.from_config import make_source
from visor_jax.data.sample import SkipSample, Source
from visor_jax.data.source_kind import SPLITS
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.stage import Step
from visor_jax.workdir.folder import Workdir
from visor_jax_data import Builder, VisorDataConfig
from visor_jax_data.__main__ import main

ANSWER = {"from": "gpt", "value": "red"}
DATA = {"source": "llava", "path": "train.json", "test_fraction": 0.25, "max_frames": 3}


def record(question: str, number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "conversations": [{"from": "human", "value": question}, ANSWER], **fields}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA records: pictures of several kinds and sizes, several pictures, videos, text only, and broken ones."""
    root = tmp_path_factory.mktemp("llava")
    rng = np.random.default_rng(0)
    kinds = ("png", "jpg", "webp", "gif")
    records = []
    for number in range(16):
        name = f"{number}.{kinds[number % 4]}"
        Image.fromarray(rng.integers(0, 256, (20 + number, 33, 3), np.uint8)).save(root / name)
        records.append(record("<image>\nWhat?", number, image=name, data_source="colors"))
    (root / "clip").mkdir()
    for number in (2, 10):
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)).save(root / "clip" / f"{number}.png")
    np.save(root / "clip.npy", rng.integers(0, 256, (5, 8, 9, 3), np.uint8))
    records += [
        record("Is <image> like <image>?", 20, image=["0.png", "1.jpg"]),
        record("Is <image> in <video> or <video>?", 21, image="2.webp", videos=["clip", "clip.npy"]),
        record("<image>\nWhat happens?", 22, video="clip.npy", system="Be terse."),
        record("Text only?", 23),
        record("no marker", 24, image="3.gif"),
    ]
    (root / "broken.jpg").write_bytes((root / "1.jpg").read_bytes()[:200])
    records += [record("<image>", 30, image="broken.jpg"), record("<image>", 31, image="gone.png"), record("", 32)]
    (root / "train.json").write_text(json.dumps(records))
    return root


def build(out: Path, name: str, data: dict[str, Any], **fields: Any) -> int:
    return main([f"--data_dir={out}", f"--config={json.dumps({'name': name, 'data': data, **fields})}"])


@pytest.fixture(scope="module")
def built(root: Path) -> Path:
    assert build(root / "out", "mine", {**DATA, "root": str(root), "max_skipped_fraction": 0.5}) == 0
    return root / "out"


def config(root: Path, **data: Any) -> Config:
    fields = {**DATA, "root": str(root), "tiles": 8, "visual_length": 512, **data}
    return as_config(tiny_config({"stages": ("full",)} | {f"data.{name}": value for name, value in fields.items()}))


def from_tfds(built: Path, **data: Any) -> Config:
    return config(built, source="tfds", path="visor_jax_data/mine", **data)


def usable(source: Source) -> Iterator[Any]:
    for index in range(len(source)):
        try:
            yield source[index]
        except SkipSample as why:
            yield why.reason


def test_samples_of_every_split_come_back_bit_for_bit(root: Path, built: Path) -> None:
    total = 0
    for split in SPLITS:
        stored = [*usable(make_source(from_tfds(built), split))]
        original = [
            one for one in usable(make_source(config(root), split)) if one not in ("missing_file", "empty_question")
        ]
        assert len(stored) == len(original)
        for sample, expected in zip(stored, original, strict=True):
            if isinstance(expected, str):
                assert sample == expected == "broken_image"  # stored as it is: refused when it is read, by its reason
                continue
            assert (sample.id, sample.turns, sample.system) == (expected.id, expected.turns, expected.system)
            assert len(sample.images) == len(expected.images)
            for image, pixels in zip(sample.images, expected.images, strict=True):
                np.testing.assert_array_equal(image, pixels)
            total += 1
    assert total == 21


PACKED = {"pack_window": 8, "pool_rows": 2, "pool_tiles": 12, "text_length": 128}


def batches(config: Config, workdir: Path) -> list[Step]:
    return list(make_objective(config, "full", Workdir(workdir)).steps(0, 9))


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["one sample per row", "packed"])
def test_llava_json_and_the_tfds_data_set_give_the_same_batches(
    root: Path, tmp_path: Path, packing: dict[str, int]
) -> None:
    records = [one for one in json.loads((root / "train.json").read_text()) if int(one["id"][1:]) < 30]
    (root / "good.json").write_text(json.dumps(records))
    assert build(tmp_path, "mine", {**DATA, "root": str(root), "path": "good.json"}) == 0
    original = batches(config(root, path="good.json", **packing), tmp_path / "a")
    for expected, batch in zip(original, batches(from_tfds(tmp_path, **packing), tmp_path / "b"), strict=True):
        assert batch.ids == expected.ids and batch.tasks == expected.tasks
        assert set(batch.arrays) == set(expected.arrays)
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(batch.arrays[name], array, err_msg=name)


def test_reading_and_building_import_no_tensorflow(root: Path, built: Path, tmp_path: Path) -> None:
    code = f"""
import sys
import tomllib
from visor_jax.config import apply_overrides, default_config
from visor_jax.data.from_config import make_source
fields = ["source=tfds", "root={built}", "path=visor_jax_data/mine", "tiles=8"]
config = apply_overrides(default_config(), [f"--config.data.{{field}}" for field in fields])
print(make_source(config, "train")[0].images[0].shape)
from visor_jax_data.__main__ import main
request = '{{"name": "few", "samples": 2, "data": {{"source": "almanac"}}}}'
assert main(["--data_dir={tmp_path}", "--config=" + request]) == 0
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "apache_beam")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]" and "(" in run.stdout


def test_changed_answers_change_the_fingerprint(root: Path, tmp_path: Path) -> None:
    """A workdir keeps the checksum of a JSON file; a TFDS data set is recognized by its fingerprint alone."""
    records = [record("<image>", number, image="0.png") for number in range(4)]
    found = []
    for answer in ("red", "red", "blue"):
        records[2]["conversations"][1] = {"from": "gpt", "value": answer}
        (root / "small.json").write_text(json.dumps(records))
        out = tmp_path / str(len(found))
        assert build(out, "mine", {**DATA, "root": str(root), "path": "small.json", "test_fraction": 0}) == 0
        found.append(fingerprint_of_split(from_tfds(out, test_fraction=0.0), "train"))
    assert found[0] == found[1] != found[2]


def test_generated_samples_are_stored_with_the_task_of_each_question(tmp_path: Path) -> None:
    assert build(tmp_path, "few", {"source": "almanac"}, samples=3, splits=["validation", "test"]) == 0
    expected = make_source(as_config(default_config()), "test")
    source = make_source(config(tmp_path, source="tfds", path="visor_jax_data/few"), "test")
    assert len(source) == 3
    assert any(len({turn.task for turn in source[index].turns}) > 1 for index in range(3))
    for index in range(3):
        assert source[index].turns == expected[index].turns
        np.testing.assert_array_equal(source[index].images[0], expected[index].images[0])


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("{", 2, "expected --config="),
        ('{"name": "x", "dat": 1}', 2, "dat"),
        ('{"name": "needs_config"}', 2, "which records"),
        ('{"name": "x", "beam": true}', 2, "tfds build ... --beam_pipeline_options"),
        ('{"name": "x", "data": {"source": "lava"}}', 2, "did you mean 'llava'"),
        ('{"name": "x", "data": {"source": "almanac"}}', 2, "samples"),
        ('{"name": "x", "splits": ["dev"], "samples": 1, "data": {"source": "almanac"}}', 2, "dev"),
        ('{"name": "x", "data": {"source": "llava", "root": "ROOT", "path": "gone.json"}}', 2, "gone.json"),
        (
            '{"name": "x", "data": {"source": "llava", "root": "ROOT", "path": "bad.json", "test_fraction": 0}}',
            1,
            "max_skipped_fraction",
        ),
        ('{"name": "mine", "data": {"source": "llava", "root": "ROOT", "path": "train.json"}}', 2, "exists already"),
    ],
)
def test_what_cannot_be_built_is_refused(
    root: Path, built: Path, arguments: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [record("<image>", number, image="gone.png") for number in range(60)]
    (root / "bad.json").write_text(json.dumps(bad))
    assert main([f"--data_dir={built}", f"--config={arguments.replace('ROOT', str(root))}"]) == status
    assert message in capsys.readouterr().err
    assert not (built / "visor_jax_data" / "x" / "1.0.0").exists()


def test_beam_makes_the_same_data_set_or_names_its_extra(root: Path, built: Path, tmp_path: Path) -> None:
    data = {**DATA, "root": str(root), "max_skipped_fraction": 0.5}
    builder = Builder(
        data_dir=tmp_path, file_format="array_record", config=VisorDataConfig("mine", data=data, beam=True)
    )
    if importlib.util.find_spec("apache_beam") is None:
        with pytest.raises(RequestError, match=r"pip install 'visor_jax\[tfds\]'"):
            builder.download_and_prepare()
        return
    options: Any = importlib.import_module("apache_beam.options.pipeline_options")
    in_memory = options.PipelineOptions(["--direct_running_mode=in_memory"])
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=in_memory))
    for split in SPLITS:
        samples, expected = (list(usable(make_source(from_tfds(out), split))) for out in (tmp_path, built))
        assert [getattr(one, "turns", one) for one in samples] == [getattr(one, "turns", one) for one in expected]


def test_wheels_hold_the_builder_where_tfds_looks_for_it() -> None:
    """TFDS finds a class Builder in the file that bears its folder's name, and names the data set after the folder."""
    top = Path(__file__).parents[2]
    include = tomllib.loads((top / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert "visor_jax_data" in setuptools.find_packages(str(top), include=include)
    assert (top / "visor_jax_data" / "visor_jax_data_dataset_builder.py").is_file()
    assert Builder.name == "visor_jax_data" and tfds.builder_cls("visor_jax_data") is Builder
