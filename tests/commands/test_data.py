"""`visor data`: its counts, output, files and refusals."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.commands import data
from visor_jax.config import load_config
from visor_jax.data.from_config import make_source, make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.preview_model import fill_rows
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources.llava import LlavaSource
from visor_jax.train.objectives.answers import stage_batches

CONFIG = """
from visor_jax.config import default_config
def get_config():
    config = default_config()
    config.data.update({data})
    config.update(stages=("full",))
    return config
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of seven records, four of them bad, and configurations for it and for generated data."""
    Image.new("RGB", (72, 72), "blue").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])

    def record(image: str, answer: str = "blue") -> dict[str, Any]:
        talk = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
        return {"id": answer, "image": image, "conversations": talk, "data_source": "colours"}

    records = [record("good.png"), record("half.png"), record("good.png", "x" * 500), record("../good.png"),
               record("good.png"), {"id": 5}, record("good.png", "dark blue")]  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(records))
    data = f"source='llava', root={str(tmp_path)!r}, path='set.json', text_length=128"
    (tmp_path / "llava.py").write_text(CONFIG.format(data=data))
    (tmp_path / "almanac.py").write_text(CONFIG.format(data="text_length=128"))
    return tmp_path


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["data", *arguments, "--json"]) == status
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    return json.loads(out[0])


def test_check_counts_by_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={folder / 'llava.py'}"
    actual = result_of(capsys, "check", config, status=1)
    skipped = {"broken_image": 1, "too_long": 1, "unsafe_path": 1, "empty_conversation": 1}
    assert (actual["samples"], actual["usable"], actual["skipped"]) == (7, 3, skipped)
    assert not actual["within_limit"] and "set.json[1]" in actual["first"]["broken_image"]
    assert actual["splits"]["all"]["duplicate_ids"] == 3
    assert actual["problems"] and actual["without_picture"] == 0
    assert main(["data", "check", config]) == 1
    printed, complaint = capsys.readouterr()
    assert (
        "1  broken_image" in printed
        and "too_long: set.json[2]: x" in printed
        and len(max(printed.splitlines(), key=len)) < 400
    )
    assert printed.splitlines()[-1] == (
        "3 of 7 samples can be used; 4 are skipped, MORE than data.max_skipped_fraction=0.05"
    )
    assert complaint.count("\n") == 1 and "training would stop: 4 of 7 samples are skipped" in complaint


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Twenty records about as many pictures, five more without any, and a configuration."""
    for number in range(20):
        Image.new("RGB", (72, 72), (number, 0, 0)).save(tmp_path / f"{number}.png")
    talk = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]
    records: list[dict[str, Any]] = [{"image": f"{n}.png", "conversations": talk} for n in range(20)]
    records += [{"id": f"t{n}", "conversations": talk} for n in range(5)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = f"source='llava', root={str(tmp_path)!r}, path='set.jsonl', text_length=128, test_fraction=0.25"
    config = CONFIG.format(data=data).replace('("full",)', '("full", "search")')
    (tmp_path / "good.py").write_text(config)
    return tmp_path


def test_check_of_a_valid_set_passes_and_counts_records_without_a_picture(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"--config={good / 'good.py'}"
    actual = result_of(capsys, "check", config)
    assert (actual["samples"], actual["usable"], actual["skipped"], actual["problems"]) == (25, 25, {}, [])
    assert actual["without_picture"] == 5 and actual["splits"]["all"]["without_picture"] == 5
    assert main(["data", "check", config]) == 0
    printed = capsys.readouterr().out
    assert "5  of the usable samples have no picture" in printed and "splits: train 10, validation 8, test 7" in printed
    assert printed.splitlines()[-1].startswith("25 of 25 samples can be used; 0 are skipped, within data.max_skipped")


def test_paths_may_begin_with_a_tilde(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(good))
    for change in ("root=~", "path=~/set.jsonl"):  # without a root, pictures are in the folder of the file
        root = "" if change.startswith("root") else "--config.data.root="
        arguments = [
            "check",
            "--config=~/good.py",
            f"--config.data.{change}",
            *filter(None, [root]),
            "--list=~/l.jsonl",
        ]
        assert result_of(capsys, *arguments)["usable"] == 25
    assert len((good / "l.jsonl").read_text().splitlines()) == 25


def test_check_lists_every_record(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good / "3.png").write_bytes((good / "2.png").read_bytes()[:60])
    with (good / "set.jsonl").open("a") as file:
        file.write('\n{"id": "x\\ud800", "conversations": []}\n{"id"')
    listing = good / "listing.jsonl"
    result_of(capsys, "check", f"--config={good / 'good.py'}", f"--list={listing}", status=1)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [row["place"] for row in rows] == [f"set.jsonl[{number}]" for number in range(27)]
    fields = {"place", "id", "usable", "reason", "detail", "pictures", "visual_tokens", "text_tokens"}
    assert all(set(row) == fields for row in rows)
    assert rows[0]["usable"] and rows[0]["pictures"] == 1 and rows[0]["visual_tokens"] == 65
    assert rows[24]["id"] == "t4" and rows[24]["pictures"] == rows[24]["visual_tokens"] == 0
    assert 0 < rows[24]["text_tokens"] <= rows[0]["text_tokens"]
    assert (rows[3]["usable"], rows[3]["reason"], rows[3]["pictures"]) == (False, "broken_image", 1)
    assert rows[25]["reason"] == "empty_conversation" and rows[25]["id"] == "x\ud800"
    assert rows[26]["reason"] == "bad_json" and "line 27 column 6" in rows[26]["detail"]
    assert sorted(path.name for path in good.iterdir() if "listing" in path.name) == ["listing.jsonl"]


@pytest.mark.parametrize(
    "change, problem",
    [
        ("test_fraction=1e-9", "leaves split 'validation' and 'test' without any of the 25"),
        ("path={split}.jsonl", "split 'validation': no file validation.jsonl"),
        ("text_length=2", "25 of 25 samples are skipped"),
        ("text_length=2 max_skipped_fraction=1", "split 'train' has no usable sample"),
    ],
)
def test_check_fails_where_training_would(
    good: Path, capsys: pytest.CaptureFixture[str], change: str, problem: str
) -> None:
    (good / "train.jsonl").write_bytes((good / "set.jsonl").read_bytes())
    changes = [f"--config.data.{one}" for one in change.split()]
    actual = result_of(capsys, "check", f"--config={good / 'good.py'}", *changes, status=1)
    assert any(problem in one for one in actual["problems"])
    capsys.readouterr()
    if "path" in change:  # only one split is checked, and it is valid
        result_of(capsys, "check", f"--config={good / 'good.py'}", *changes, "--split=train")


def test_stats_measure_records_with_more_pictures_than_a_row_holds(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"from": "human", "value": "<image><image><image>"}, {"from": "gpt", "value": "red"}]
    (good / "set.jsonl").write_text(json.dumps({"image": ["0.png"] * 3, "conversations": talk}))
    actual = result_of(capsys, "stats", f"--config={good / 'good.py'}")
    assert actual["lengths"]["tiles"]["max"] == 3 and actual["lengths"]["tiles"]["fit"] == 0


def test_stats_measure_what_can_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actual = result_of(capsys, "stats", f"--config={folder / 'llava.py'}")
    assert (actual["samples"], actual["skipped"], actual["tasks"]) == (4, 3, {"colours": 4})
    text = actual["lengths"]["text"]
    assert text["max"] > 500 and text["fit"] == 0.75 and text["room"] == 128 and sum(text["histogram"]["counts"]) == 4
    assert actual["lengths"]["visual"]["max"] == 65 and actual["lengths"]["tiles"]["max"] == 1


def test_build_writes_what_can_be_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = f"--config={folder / 'almanac.py'}", folder / "built"
    actual = result_of(capsys, "build", config, f"--out={out}", "--samples=5")
    assert actual["samples"] == {"train": 5, "validation": 5, "test": 5}
    back = LlavaSource(out / "test.json", out, max_image_pixels=10**6)
    source = make_source(load_config(folder / "almanac.py"), "test")
    for index in range(5):
        sample = source[index]
        np.testing.assert_array_equal(back[index].images[0], sample.images[0])
        assert back[index].id == sample.id
        assert [(t.question.removeprefix("<image>\n"), t.answer) for t in back[index].turns] == [
            (t.question, t.answer) for t in sample.turns
        ]
    assert main(["data", "build", config, f"--out={out}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"images", "train.json", "validation.json", "test.json"}


def test_build_keeps_system_texts_and_records_without_a_picture(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "system", "value": "Be terse."}, {"from": "human", "value": "Two?"}, {"from": "gpt", "value": 2}]
    records = [{"conversations": talk}, {"image": "0.png", "conversations": talk}]
    (good / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    result_of(capsys, "build", f"--config={good / 'good.py'}", f"--out={good / 'built'}")
    before = LlavaSource(good / "set.jsonl", good, max_image_pixels=10**6)
    after = LlavaSource(good / "built" / "all.json", good / "built", max_image_pixels=10**6)
    for index in range(2):
        assert after[index].system == before[index].system == "Be terse."
        assert len(after[index].images) == index and after[index].turns[0].answer == "2"


def test_build_leaves_other_peoples_folders_alone_and_is_on_the_disk_before_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = f"--config={folder / 'almanac.py'}", folder / "built"
    (folder / "built.partial").mkdir()
    (folder / "built.partial" / "mine").write_text("precious")
    left = folder / f".built.{2**22 + 1}.partial"  # from a killed process: no process has this number
    (left / "images").mkdir(parents=True)
    flushed, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        assert not out.exists() or os.fstat(descriptor).st_ino == folder.stat().st_ino
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert main(["data", "build", config, f"--out={out}", "--samples=2"]) == 0
    assert (folder / "built.partial" / "mine").read_text() == "precious" and not left.exists()
    assert {path.stat().st_ino for path in [folder, out, *out.rglob("*")]} == flushed


def test_a_build_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert main(["data", "build", f"--config={folder / 'almanac.py'}", f"--out={folder / 'built'}", "--samples=2"]) == 1
    assert not [path for path in folder.iterdir() if "built" in path.name]


def test_preview_writes_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("almanac", "llava"):
        out = folder / f"{name}.png"
        result_of(capsys, "preview", f"--config={folder / f'{name}.py'}", f"--out={out}", "--samples=3")
        with Image.open(out) as sheet:
            assert min(sheet.size) > 72


def test_a_picture_is_written_below_a_name_that_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "sheet.xyz"
    assert main(["data", "preview", f"--config={folder / 'almanac.py'}", f"--out={out}"]) == 2
    assert "sheet.xyz: expected a name that ends with .png" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("changes", [[], ["--config.data.pack_window=4", "--config.data.pool_rows=2",
    "--config.data.pool_tiles=8", "--config.data.batch_size=4"]])  # fmt: skip
def test_preview_draws_the_rows_of_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    """The samples that wait are those of the training stream, for the first pool."""
    drawn: list[Any] = []
    monkeypatch.setattr(data, "model_sheet", lambda pairs, waiting, title, config, out: drawn.append((waiting, config)))
    config = f"--config={folder / 'almanac.py'}"
    assert main(["data", "preview", config, f"--out={folder / 'sheet.png'}", "--samples=1", *changes]) == 0
    waiting, configured = drawn[0]
    rows, _, per_pool = fill_rows(waiting, configured)
    with stream_of(configured) as batches:
        ids = next(batches).ids
    found = [example.id for row in rows for example in row]
    assert found == ids[: len(found)] and len(rows) == (3 if per_pool == 1 else 2)


def stream_of(config: Any) -> Any:
    """The batches of stage "full", as training makes them."""
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    return stage_batches(config, "full", encode, SkipLog())


@pytest.mark.parametrize("flag", ["check --list", "preview --out"])
def test_what_is_written_replaces_no_device_and_no_link(
    folder: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("new.png")
    config, (action, option) = f"--config={folder / 'llava.py'}", flag.split()
    assert main(["data", action, config, f"{option}={folder / 'pipe.png'}"]) == 2
    assert f"{option}={folder / 'pipe.png'}: cannot be written: Not a regular file" in capsys.readouterr().err
    assert (folder / "pipe.png").is_fifo()
    assert main(["data", action, config, f"{option}={folder / 'link.png'}"]) == (1 if action == "check" else 0)
    assert (folder / "link.png").is_symlink() and (folder / "new.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["build"], "--out is missing"),
        (["check", "--samples=0"], "at least 1"),
        (["check", "--workers=-1"], "expected a whole number from 0 to 1024"),
        (["check", "--view=model"], "--view=model belongs to data preview"),
        (["stats", "--workers=2"], "--workers=2 belongs to data check"),
        (["build", "--restart", "--out=x"], "--restart belongs to data check"),
        (["chek"], "invalid choice"),
        (["check", "--split=dev"], "invalid choice"),
        (["stats", "--list=x.jsonl"], "--list=x.jsonl belongs to data check"),
        (["check", "--format=array_record"], "data check: --format and --shards belong to data build"),
        (["build", "--out=x", "--shards=2"], "--shards=2: belongs to --format=array_record"),
        (["check", "--list=none/x.jsonl"], "--list=none/x.jsonl: cannot be written"),
        (["check", "--config.data.path=none.json"], "none.json: No such file"),
        (["check", "--config.data.path={split}.json"], "train.json: No such file"),
    ],
)
def test_wrong_requests(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["data", *arguments, f"--config={folder / 'llava.py'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("action", ["preview", "build"])
def test_places_that_cannot_be_written_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    taken = folder / "almanac.py" / "inside.png"
    assert main(["data", action, f"--config={folder / 'almanac.py'}", f"--out={taken}", "--samples=2"]) == 2
    error = capsys.readouterr().err
    assert f"--out={taken}: cannot be written" in error and error.count("\n") == 1
