"""The commands, in-process: results of `--json`, and exit status 2 with one line for wrong requests."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visor_jax.errors
from tests.evaluate.benchmarks import hub_tables
from visor_jax.__main__ import main
from visor_jax.export import torch_export
from visor_jax.files.read_write import read_json
from visor_jax.loading import load

CONFIGS = Path(visor_jax.errors.__file__).parents[1] / "configs"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1, "with --json stdout holds only the result"
    return json.loads(out[0])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("visor: ")]
    assert output.err.count("Traceback") == 0 and output.out == ""
    return lines[-1]


# --- results ----------------------------------------------------------------------------------------------------------


def test_generate(tiny_run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (f"--workdir={tiny_run}", f"--model={tiny_run / 'policy'}"):
        answer = result_of(
            capsys, "generate", where, f"--image={picture}", "--question=What colour?", "--max-new-tokens=3"
        )
        assert {"text", "budget", "flops", "seconds_to_first_token", "seconds", "cache_bytes"} <= answer.keys()
        assert answer["budget"] in ("empty", "0b01", "0b10", "full")


def test_generate_about_a_video(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 9, 8, 3), np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{number}.png")
    expected = load(tiny_run).answer(frames[[0, 2, 4]], "What happens?", "full", 3)
    ask = "generate", f"--workdir={tiny_run}", "--question=What happens?", "--budget=full", "--max-new-tokens=3"
    for name in ("clip.npy", "clip"):
        assert result_of(capsys, *ask, f"--video={tmp_path / name}", "--max-frames=3")["text"] == expected.text
    assert main([*ask, f"--video={tmp_path / 'gone.mp4'}"]) == 2
    assert "--video=" in capsys.readouterr().err
    assert main([*ask, f"--video={tmp_path / 'clip'}", "--max-frames=0"]) == 2
    assert "max_frames=0: expected 1 or more" in capsys.readouterr().err


def test_generate_draws_and_streams(tiny_run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = "generate", f"--workdir={tiny_run}", f"--image={picture}", "--question=What colour?", "--budget=full"
    drawn = *ask, "--temperature=2", "--top-p=0.9", "--max-new-tokens=12"
    texts = [result_of(capsys, *drawn, f"--seed={seed}")["text"] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert result_of(capsys, *drawn, "--seed=3", "--stream")["text"] == texts[0]
    assert main([*drawn, "--seed=3", "--stream"]) == 0
    *lines, receipt = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert "\n".join(lines) == texts[0] and receipt.startswith("budget full; ")


def test_generate_in_a_conversation(
    tiny_run: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any number of pictures, earlier turns, also in a chat, and `~` in every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(tiny_run)
    turns = [["<image> or <image>?", "red"]]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    here = "generate", "--workdir=~/run", "--max-new-tokens=3", "--budget=full"
    pictures = "--image=~/red.png", f"--image={picture}"
    asked = result_of(capsys, *here, *pictures, "--history=~/turns.json", "--question=And where?")
    expected = load("~/run").answer([picture] * 2, "And where?", "full", 3, history=[("<image> or <image>?", "red")])
    assert (asked["text"], asked["flops"]) == (expected.text, expected.flops)
    assert result_of(capsys, *here, "--question=What?")["flops"] < asked["flops"] / 2, "no picture"

    monkeypatch.setattr("sys.stdin", io.StringIO("And where?\n/budget none\n"))
    assert main([*here, *pictures, "--chat", "--question=<image> or <image>?", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["<image> or <image>?", "And where?", "/budget none"]
    again = load("~/run").answer(
        [picture] * 2, "And where?", "full", 3, history=[("<image> or <image>?", rows[0]["text"].strip() or "-")]
    )
    assert not rows[0]["text"].strip() or rows[1]["text"] == again.text
    assert "budget" in rows[2]["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "turns.json: not valid JSON"),
        ('{"question": "answer"}', "history: expected earlier turns, [(question, answer), ...], got dict"),
        ('[["question"]]', "history[0]: expected earlier turns"),
        (None, "turns.json: no such file"),
    ],
)
def test_invalid_histories(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the model is loaded."""
    if content is not None:
        (tmp_path / "turns.json").write_text(content)
    ask = "generate", f"--workdir={tmp_path / 'nowhere'}", "--question=What?"
    assert message in refusal(capsys, *ask, f"--history={tmp_path / 'turns.json'}")


def test_generate_on_an_exported_folder(
    tiny_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    torch_export.write_folder(
        tmp_path / "out", load(tiny_run), stage="policy", dtype="float32", max_shard_bytes=100_000_000
    )
    ask = f"--image={picture}", "--question=What colour?", "--max-new-tokens=4"
    there, here = (result_of(capsys, "generate", f"--model={path}", *ask) for path in (tmp_path / "out", tiny_run))
    for name in ("text", "budget", "flops", "cache_bytes"):
        assert there[name] == here[name]


def test_evaluate(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actual = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", "--budget=empty, full", "--stage=universal")
    assert set(actual["budgets"]) == {"empty", "full"}
    for row in actual["budgets"].values():
        assert {"easy", "hard", "tasks", "decoder_gflops", "end_to_end_gflops", "samples"} <= row.keys()
    assert read_json(tiny_copy / "eval" / "partial" / "test.json") == actual
    whole = read_json(tiny_copy / "eval" / "test.json")["budgets"]
    assert {"empty", "full", "auto"} <= set(whole), "the complete evaluation is kept"
    before = (tiny_copy / "eval" / "test.json").read_bytes()
    other = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", "--config.evaluate.samples=3")
    assert other == read_json(tiny_copy / "eval" / "partial" / "test.json") and set(other["budgets"]) == set(whole)
    assert (tiny_copy / "eval" / "test.json").read_bytes() == before


def test_evaluate_on_a_users_own_questions(tiny_copy: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "image": picture.name, "conversations": talk} for n in range(3)]
    (picture.parent / "set.json").write_text(json.dumps(records))
    data, evaluation = f"--data={picture.parent / 'set.json'}", read_json(tiny_copy / "eval" / "test.json")
    actual = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", data, "--benchmark=llava", "--budget=empty")
    row = actual["budgets"]["empty"]
    assert row["samples"] == 3 and row["easy"] is None and set(row["tasks"]) == {"all"}
    assert read_json(tiny_copy / "eval" / "of_set" / "partial" / "test.json") == actual
    actual = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", data)
    assert read_json(tiny_copy / "eval" / "of_set" / "test.json") == actual and "auto" in actual["budgets"]
    assert read_json(tiny_copy / "eval" / "test.json") == evaluation, "the run's evaluation is kept"


def test_evaluate_against_another_run(tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own answers, of which three are asked again; then with one of them changed."""
    asked = "evaluate", f"--workdir={tiny_copy}", "--budget=empty,full", "--config.evaluate.samples=3"
    actual = result_of(capsys, *asked, f"--against={tiny_copy}")["against"]
    assert actual["files"] == [str(tiny_copy / "eval" / "test.questions.json")]
    for name, row in actual["budgets"].items():
        assert row["budget"] == name and {figures["difference"] for figures in row["tasks"].values()} == {0}
    answered = read_json(tiny_copy / "eval" / "test.questions.json")
    answered["budgets"]["right"] = {"dense": "1" * len(answered["budgets"]["ids"])}
    (tmp_path / "dense.json").write_text(json.dumps(answered))
    actual = result_of(capsys, *asked, f"--against={tmp_path / 'dense.json'}", "--against-budget=dense")["against"]
    for row in actual["budgets"].values():
        assert all(figures["other"] == 1 for figures in row["tasks"].values()) and row["budget"] == "dense"
    assert "expected also --against=" in refusal(capsys, *asked, "--against-budget=full")
    assert "has no eval/test.questions.json" in refusal(capsys, *asked, f"--against={tmp_path}")


def test_evaluate_on_public_benchmarks(tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub_tables.write("pope", tmp_path / "hub" / "POPE", hub_tables.rows_of("pope", 3))
    hub_tables.write("chartqa", tmp_path / "hub" / "ChartQA", hub_tables.rows_of("chartqa", 3))
    asked = "evaluate", f"--workdir={tiny_copy}", "--benchmark=chartqa, pope", f"--data={tmp_path / 'hub'}"
    actual = result_of(capsys, *asked, "--limit=2", "--budget=full")
    assert set(actual["benchmarks"]) == {"chartqa", "pope"} and actual["budgets"]["full"]["samples"] == 4
    for name, split in (("chartqa", "test"), ("pope", "test")):
        folder = tiny_copy / "eval" / f"of_{name}" / "partial"
        assert read_json(folder / f"{split}.json") == actual["benchmarks"][name]
        assert len((folder / f"{split}.predictions.jsonl").read_text().splitlines()) == 2


def test_search_label_and_run_of_a_complete_workdir(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    viable = result_of(capsys, "search", f"--workdir={tiny_run}")["viable"]
    assert viable == read_json(tiny_run / "search" / "viable.json")["viable"]
    labels = result_of(capsys, "label", f"--workdir={tiny_run}")
    assert labels == read_json(tiny_run / "labels" / "labels.json")
    trained = result_of(capsys, "train", f"--workdir={tiny_run}", "--config.stage=full")
    assert trained == {"stages": {"full": 0.0}}


def test_report(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actual = result_of(capsys, "report", f"--workdir={tiny_copy}")
    page = Path(actual["report"]).read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "auto" in page


def test_plan_of_a_picture_needs_no_jax() -> None:
    """The command compiles nothing: it does not load JAX."""
    code = (
        "import sys; from visor_jax.__main__ import main; "
        f"status = main(['plan', '--config={CONFIGS / 'llava_ov_7b.py'}', '--image=640x480', '--json']); "
        "sys.exit(9 if 'jax' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tiles"] == 5 and json.loads(done.stdout)["visual_tokens"] == 2929


def test_plan_of_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """A page of 1700 x 2200 pixels has, by contract, 31 tiles and 7353 visual tokens."""
    actual = result_of(capsys, "plan", f"--config={CONFIGS / 'llava_ov_0p5b.py'}", "--image=1700x2200")
    assert actual["tiles"] == 31 and actual["visual_tokens"] == 7353
    costs = actual["decoder_gflops"]
    assert costs["empty"] < costs["full"] < costs["dense"] and actual["tower_gflops"] > 0
    two = costs["0b11000000"]
    assert 8 < costs["dense"] / two < 12


# --- wrong requests ---------------------------------------------------------------------------------------------------


def test_invalid_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before the model is loaded."""
    ask = "generate", f"--workdir={tmp_path / 'nowhere'}", "--question=What?"
    (tmp_path / "text.png").write_text("no picture")
    Image.new("P", (9, 9)).save(tmp_path / "bitmap.jpg", format="BMP")
    Image.new("RGB", (99, 99), "red").save(tmp_path / "red.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:-200])
    bomb = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)  # a header that declares 100 megapixels
    chunk = b"IHDR" + bomb
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(
        header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    for name, message in {
        "none.png": "missing_file",
        "text.png": "image_format",
        "bitmap.jpg": "image_format",
        "half.jpg": "broken_image",
        "bomb.png": "too_many_pixels: .* is 10000x10000",
        ".": "not a regular file",
    }.items():
        output = refusal(capsys, *ask, f"--image={tmp_path / name}")
        assert re.search(
            f"--image={tmp_path / name}: .*{message}.*; expected a JPEG, PNG, WEBP, GIF file of at most", output
        )
    assert "--question is missing; expected --question=TEXT, or --chat" in refusal(capsys, *ask[:2])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--temperature=-1", "temperature=-1.0: expected 0 (the best token) or a positive number"),
        ("--temperature=nan", "temperature=nan"),
        ("--temperature=warm", "argument --temperature: invalid float value: 'warm'"),
        ("--top-p=0", "top_p=0.0: expected more than 0 and at most 1"),
        ("--top-p=1.5", "top_p=1.5"),
        ("--top-p=nan", "top_p=nan"),
        ("--seed=-1", "seed=-1"),
        ("--max-new-tokens=0", "max_new_tokens=0"),
        ("--dial=inf", "dial=inf"),
        ("--budget=fulll", "did you mean 'full'"),
        ("--question= ", "question: is empty"),
        ("--temprature=1", "did you mean '--temperature'"),
    ],
)
def test_settings_of_generate(
    setting: str, message: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the model is loaded."""
    ask = "generate", f"--model={tmp_path / 'nowhere'}", f"--image={picture}", "--question=What?", setting
    assert message in refusal(capsys, *ask)


def test_generate_mistakes(tiny_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = "generate", f"--image={picture}", "--question=What?"
    assert "expected one of --workdir=DIR and --model=DIR" in refusal(capsys, *ask)
    assert "no such folder" in refusal(capsys, *ask, f"--workdir={tmp_path / 'none'}")
    assert "no complete stage" in refusal(capsys, *ask, f"--workdir={tmp_path}")
    here = f"--workdir={tiny_run}"
    assert "0b1" in refusal(capsys, *ask, here, "--budget=0b1")
    assert "asks for more slots than the model has" in refusal(capsys, *ask, here, "--budget=3")


def test_a_budget_that_is_not_viable(tiny_copy: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    viable = read_json(tiny_copy / "search" / "viable.json")["viable"]
    one = [name for name in ("0b01", "0b10") if name in viable]
    (kept,), other = one, {"0b01": "0b10", "0b10": "0b01"}[one[0]]
    ask = "generate", f"--workdir={tiny_copy}", f"--image={picture}", "--question=What?", "--max-new-tokens=1"
    message = f"'{other}' is not viable: expected one of auto, empty, {kept}, full"
    assert message in refusal(capsys, *ask, f"--budget={other}")
    assert result_of(capsys, *ask, "--budget=1")["budget"] == kept


def test_unknown_stages(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"--workdir={tiny_run}"
    assert "'universal'" in refusal(capsys, "train", here, "--config.stage=univresal")
    assert "--config.stage" in refusal(capsys, "train", here)
    assert "universal" in refusal(capsys, "evaluate", here, "--stage=univresal")
    assert "not complete" in refusal(capsys, "evaluate", here, "--stage=dense")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_other_weights_than_the_run_chose_are_refused(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    average = ("--config.train.ema_decay=0.9", "--config.train.use_ema=True")
    err = refusal(capsys, command, f"--workdir={tiny_run}", *average)
    assert f"train.use_ema=True: {tiny_run} was trained with False" in err


def test_evaluate_mistakes(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = "evaluate", f"--workdir={tiny_run}"
    assert "fulll" in refusal(capsys, *here, "--budget=fulll")
    assert "needs --data=FOLDER, with the files of lmms-lab" in refusal(capsys, *here, "--benchmark=docvqa")
    assert "did you mean 'docvqa'" in refusal(capsys, *here, "--benchmark=dokvqa")
    assert "did you mean 'chartqa'" in refusal(capsys, *here, "--benchmark=docvqa,chartq", f"--data={tmp_path}")
    assert "DocVQA/validation-*.parquet" in refusal(capsys, *here, "--benchmark=docvqa", f"--data={tmp_path}")
    assert "no --split with docvqa" in refusal(
        capsys, *here, "--benchmark=docvqa", f"--data={tmp_path}", "--split=validation"
    )
    assert "--limit=0" in refusal(capsys, *here, "--benchmark=docvqa", f"--data={tmp_path}", "--limit=0")
    assert "--config.evaluate.samples=5" in refusal(capsys, *here, "--limit=5")
    assert "none.json" in refusal(capsys, *here, f"--data={tmp_path / 'none.json'}")
    assert "--split" in refusal(capsys, *here, "--split=train")
    assert "config.json" in refusal(capsys, "evaluate", f"--workdir={tmp_path / 'none'}")


@pytest.mark.parametrize("size", ["1700", "0x5", "1700x2200x3", "-1x5", "axb"])
def test_plan_mistakes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = refusal(capsys, "plan", f"--config={CONFIGS / 'llava_ov_0p5b.py'}", f"--image={size}")
    assert f"--image={size}" in output and "WIDTHxHEIGHT" in output


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none" in refusal(capsys, "report", f"--workdir={tmp_path / 'none'}")


@pytest.mark.slow
def test_the_same_question_again_compiles_nothing(tiny_run: Path, picture: Path, tmp_path: Path) -> None:
    """All compiled programs are cached: a second process adds none to the user's cache."""
    left_out = {"JAX_COMPILATION_CACHE_DIR", "VISOR_COMPILE_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    ask = "generate", f"--workdir={tiny_run}", f"--image={picture}", "--question=What colour?", "--max-new-tokens=3"
    remaining = []
    for _ in range(2):
        command = [sys.executable, "-P", "-m", "visor_jax", *ask]
        subprocess.run(command, check=True, env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
        remaining.append(sorted(file.name for file in (tmp_path / "visor_jax").glob("*-cache")))
    assert remaining[0] == remaining[1] != []
