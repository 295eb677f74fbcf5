"""`visor data build --format=array_record`: the same batches as from the files that it converted, bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.data.sources import source_kind
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.workdir.folder import Workdir

_file = Path(__file__).parent / "sources" / "layouts.py"
_spec = importlib.util.spec_from_file_location("layouts", _file)
assert _spec is not None and _spec.loader is not None
layouts: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)

SHAPE = {"data.tiles": 2, "data.visual_length": 180, "data.text_length": 128, "data.test_fraction": 0.25}


def changes(source: str, root: Path, path: str) -> dict[str, Any]:
    return {"data.source": source, "data.root": str(root), "data.path": path, "stages": ("full",), **SHAPE}


def configured(source: str, root: Path, path: str) -> Any:
    return tiny_config(changes(source, root, path))


def batches(config: Any, workdir: Path, count: int = 4) -> list[dict[str, np.ndarray]]:
    objective = make_objective(config, "full", Workdir(workdir))
    return [step.arrays for step in objective.steps(0, count)]


def build(config: dict[str, Any], folder: Path, *arguments: str) -> None:
    """Runs the command on the tiny configuration with these fields."""
    code = f"from visor_jax.testing import tiny_config\n\n\ndef get_config():\n    return tiny_config({config!r})\n"
    (folder / "config.py").write_text(code)
    out = f"--out={folder / 'built'}"
    assert main(["data", "build", f"--config={folder / 'config.py'}", out, "--format=array_record", *arguments]) == 0


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["llava", "parquet", "messages"])
def test_converted_data_give_the_same_batches(layout: str, shards: int, tmp_path: Path) -> None:
    source, write = layouts.LAYOUTS[layout]
    data = (source, tmp_path / "data", write(tmp_path / "data"))
    build(changes(*data), tmp_path, f"--shards={shards}")
    name = "all.array_record" if shards == 1 else f"all-*-of-{shards:05d}.array_record"
    after = configured("array_record", tmp_path / "built", name)
    pairs = zip(batches(configured(*data), tmp_path / "a"), batches(after, tmp_path / "b"), strict=True)
    for theirs, mine in pairs:
        assert theirs.keys() == mine.keys()
        for key, array in theirs.items():
            assert array.dtype == mine[key].dtype and np.array_equal(array, mine[key]), key
    files = sorted((tmp_path / "built").iterdir())
    assert [file.name for file in files] == (
        ["all.array_record"] if shards == 1 else [f"all-{n:05d}-of-{shards:05d}.array_record" for n in range(shards)]
    )


def test_records_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layouts.write_llava(tmp_path / "data")
    (tmp_path / "data" / "images" / "1.png").write_bytes(layouts.picture(1)[:-40])
    build(changes("llava", tmp_path / "data", "set.json"), tmp_path, "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["samples"] == {"all": layouts.COUNT - 1} and result["skipped"] == {"set/broken_image": 1}


def test_generated_data_are_converted_too(tmp_path: Path) -> None:
    config = tiny_config({"stages": ("full",)})
    build({"stages": ("full",)}, tmp_path, "--samples=3", "--split=train")
    converted = configured("array_record", tmp_path / "built", "train.array_record")
    source = source_kind(converted).open(converted, "all")
    theirs = source_kind(config).open(config, "train")
    for index in range(3):
        assert np.array_equal(source[index].images[0], theirs[index].images[0])
        assert [turn.answer for turn in source[index].turns] == [turn.answer for turn in theirs[index].turns]


def test_videos_are_converted_with_their_frames(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "clip").mkdir(parents=True)
    frames = [Image.new("RGB", (8, 6), (40 * number, 0, 0)) for number in range(3)]
    for number, frame in enumerate(frames):
        frame.save(folder / "clip" / f"{number}.png")
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    answer = {"from": "gpt", "value": "a"}
    listed = ["clip/0.png", "clip/2.png"]
    records = [
        {"id": "folder", "video": "clip", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, answer]},
        {"id": "gif", "video": "clip.gif", "conversations": [{"from": "human", "value": "<video> What?"}, answer]},
        {"id": "both", "image": "clip/1.png", "video": [listed]},
    ]
    records[2]["conversations"] = [{"from": "human", "value": "<video> or <image>?"}, answer]
    (folder / "set.json").write_text(json.dumps(records))
    fields = {**changes("llava", folder, "set.json"), "data.tiles": 8, "data.test_fraction": 0.0}
    build(fields, tmp_path)
    after = {**fields, "data.source": "array_record", "data.root": str(tmp_path / "built")}
    sources = []
    for config in (tiny_config(fields), tiny_config({**after, "data.path": "all.array_record"})):
        sources.append(source_kind(config).open(config, "all"))
    theirs, mine = sources
    for index in range(3):
        assert (mine[index].id, mine[index].turns) == (theirs[index].id, theirs[index].turns)
        pairs = list(zip(mine[index].images, theirs[index].images, strict=True))
        assert pairs and all(np.array_equal(a, b) for a, b in pairs)
        assert mine.outline(index).turns == mine[index].turns
    assert [image.ndim for image in mine[2].images] == [4, 3]


def test_videos_become_arrays_beside_llava_json(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), np.uint8)
    np.save(folder / "clip.npy", frames)
    Image.fromarray(frames[0]).save(folder / "a.png")
    talk = [{"from": "human", "value": "<image> or <video>?"}, {"from": "gpt", "value": "red"}]
    (folder / "set.json").write_text(json.dumps([{"image": "a.png", "video": "clip.npy", "conversations": talk}]))
    before = changes("llava", folder, "set.json") | {"data.tiles": 5, "data.test_fraction": 0.0}
    build(before, tmp_path, "--format=llava")
    (record,) = json.loads((tmp_path / "built" / "all.json").read_text())
    assert record["conversations"] == talk and (tmp_path / "built" / record["video"]).suffix == ".npy"
    after = tiny_config(before | {"data.root": str(tmp_path / "built"), "data.path": "all.json"})
    pictures = source_kind(after).open(after, "all")[0].images
    assert np.array_equal(pictures[0], frames[0]) and np.array_equal(pictures[1], frames)
