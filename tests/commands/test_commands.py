"""The commands, in-process: what `--json` holds, and exit status 2 with one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import visor_jax.errors
from visor_jax.__main__ import main
from visor_jax.workdir import read_json

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
    assert len(out) == 1, "with --json nothing else is on stdout"
    return json.loads(out[0])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("visor: ")]
    assert told.err.count("Traceback") == 0 and told.out == ""
    return lines[-1]


# --- results ----------------------------------------------------------------------------------------------------------


def test_generate(tiny_run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (f"--workdir={tiny_run}", f"--model={tiny_run / 'policy'}"):
        answer = result_of(
            capsys, "generate", where, f"--image={picture}", "--question=What colour?", "--max-new-tokens=3"
        )
        assert {"text", "budget", "flops", "seconds_to_first_token", "seconds", "cache_bytes"} <= answer.keys()
        assert answer["budget"] in ("empty", "0b01", "0b10", "full")


def test_evaluate(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", "--budget=empty, full", "--stage=universal")
    assert set(found["budgets"]) == {"empty", "full"}
    for row in found["budgets"].values():
        assert {"easy", "hard", "tasks", "decoder_gflops", "end_to_end_gflops", "samples"} <= row.keys()
    assert read_json(tiny_copy / "eval" / "test.json") == found


def test_evaluate_on_a_users_own_questions(tiny_copy: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "image": picture.name, "conversations": talk} for n in range(3)]
    (picture.parent / "set.json").write_text(json.dumps(records))
    data = f"--data={picture.parent / 'set.json'}"
    found = result_of(capsys, "evaluate", f"--workdir={tiny_copy}", data, "--benchmark=llava", "--budget=empty")
    row = found["budgets"]["empty"]
    assert row["samples"] == 3 and row["easy"] is None and set(row["tasks"]) == {"all"}


def test_search_label_and_run_of_a_complete_workdir(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    viable = result_of(capsys, "search", f"--workdir={tiny_run}")["viable"]
    assert viable == read_json(tiny_run / "search" / "viable.json")["viable"]
    labels = result_of(capsys, "label", f"--workdir={tiny_run}")
    assert labels == read_json(tiny_run / "labels" / "labels.json")
    trained = result_of(capsys, "train", f"--workdir={tiny_run}", "--config.stage=full")
    assert trained == {"stages": {"full": 0.0}}


def test_report(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(capsys, "report", f"--workdir={tiny_copy}")
    page = Path(found["report"]).read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "auto" in page


def test_plan_of_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """A page of 1700 x 2200 pixels, by contract: 31 tiles and 7353 visual tokens."""
    found = result_of(capsys, "plan", f"--config={CONFIGS / 'llava_ov_0p5b.py'}", "--image=1700x2200")
    assert found["tiles"] == 31 and found["visual_tokens"] == 7353
    costs = found["decoder_gflops"]
    assert costs["empty"] < costs["full"] < costs["dense"] and found["tower_gflops"] > 0
    two = costs["0b11000000"]
    assert 8 < costs["dense"] / two < 12


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_pictures_that_are_none(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    ask = "generate", f"--workdir={tiny_run}", "--question=What?"
    assert "none.png" in refusal(capsys, *ask, f"--image={tmp_path / 'none.png'}")
    assert "text.png" in refusal(capsys, *ask, f"--image={tmp_path / 'text.png'}")
    assert "--image" in refusal(capsys, *ask)


def test_generate_mistakes(tiny_run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = "generate", f"--image={picture}", "--question=What?"
    assert "expected one of --workdir=DIR and --model=DIR" in refusal(capsys, *ask)
    assert "no complete stage" in refusal(capsys, *ask, f"--workdir={tmp_path / 'none'}")
    here = f"--workdir={tiny_run}"
    assert "0b1" in refusal(capsys, *ask, here, "--budget=0b1")
    assert "dial" in refusal(capsys, *ask, here, "--dial=nan")
    assert "max_new_tokens=-1" in refusal(capsys, *ask, here, "--max-new-tokens=-1")
    assert "question: is empty" in refusal(capsys, "generate", here, f"--image={picture}", "--question=")


def test_unknown_stages(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"--workdir={tiny_run}"
    assert "'universal'" in refusal(capsys, "train", here, "--config.stage=univresal")
    assert "--config.stage" in refusal(capsys, "train", here)
    assert "universal" in refusal(capsys, "evaluate", here, "--stage=univresal")
    assert "not complete" in refusal(capsys, "evaluate", here, "--stage=dense")


def test_evaluate_mistakes(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = "evaluate", f"--workdir={tiny_run}"
    assert "fulll" in refusal(capsys, *here, "--budget=fulll")
    assert "docvqa" in refusal(capsys, *here, "--benchmark=docvqa")
    assert "none.json" in refusal(capsys, *here, f"--data={tmp_path / 'none.json'}")
    assert "--split" in refusal(capsys, *here, "--split=train")
    assert "config.json" in refusal(capsys, "evaluate", f"--workdir={tmp_path / 'none'}")


@pytest.mark.parametrize("size", ["1700", "0x5", "1700x2200x3", "-1x5", "axb"])
def test_plan_mistakes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "plan", f"--config={CONFIGS / 'llava_ov_0p5b.py'}", f"--image={size}")
    assert f"--image={size}" in told and "WIDTHxHEIGHT" in told


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none" in refusal(capsys, "report", f"--workdir={tmp_path / 'none'}")
