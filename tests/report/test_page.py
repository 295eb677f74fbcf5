"""The report's page: its content, its omissions, and escaping of all text."""

from __future__ import annotations

import io
import json
import re
import shutil
import xml.etree.ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.parsed import report_of
from visor_jax.errors import RequestError
from visor_jax.report.examples import MARK, PICTURE, STRONGEST, embedded
from visor_jax.report.numbers import DASH, MINUS, TIMES, duration, flops, percent, points, times
from visor_jax.report.page import write_report
from visor_jax.workdir.folder import Workdir

Edit = Callable[[Callable[[dict[str, Any]], Any]], None]


def forget_training(folder: Path) -> None:
    """Removes the stages' metrics, because drawing curves is slow and most tests do not check them."""
    for metrics in folder.glob("*/metrics.jsonl"):
        shutil.rmtree(metrics.parent)


def add_controls(evaluation: dict[str, Any]) -> None:
    """Adds a task of level middle, controls, intervals and kinds, as a source with controls has them."""
    evaluation["levels"]["title"] = "middle"
    for row in evaluation["budgets"].values():
        row["tasks"]["title"] = row["middle"] = 0.75
    for control, accuracy in (("blind", 0.25), ("shuffled", 0.125)):
        evaluation[control] = json.loads(json.dumps(evaluation["budgets"]))
        for row in evaluation[control].values():
            row |= {"easy": accuracy, "middle": accuracy, "hard": accuracy, "samples": 256}
            row["tasks"] = dict.fromkeys(row["tasks"], accuracy)
    limits = {"tasks": {"title": [0.70, 0.80]}, "middle": [0.70, 0.80]}
    groups = ("budgets", "blind", "shuffled")
    evaluation["intervals"] = {"confidence": 0.95}
    evaluation["intervals"] |= {group: dict.fromkeys(evaluation["budgets"], limits) for group in groups}
    of_kind = {name: {"easy": 1.0, "middle": 0.5, "hard": None} for name in evaluation["budgets"]}
    evaluation["kinds"] = {"table<2>": {"samples": 77, "budgets": of_kind}}


def test_levels_controls_intervals_and_kinds(full_run: Path, edit_evaluation: Edit) -> None:
    forget_training(full_run)
    edit_evaluation(add_controls)
    _, page = report_of(full_run)
    assert "easy, middle, hard counted equally" in page.section("header")
    accuracy = page.section("accuracy")
    assert "mean of middle tasks 75.0 ±5.0 75.0 ±5.0" in accuracy and "Wilson's" in accuracy
    assert "By kind of picture" in accuracy and "table<2> 77 100.0" in accuracy
    controls = page.section("controls")
    assert "The first 256 questions once more with auto" in controls
    assert "its own a gray one another question's" in controls
    assert "title 75.0 ±5.0 25.0 (70.0 to 80.0) 12.5 (70.0 to 80.0)" in controls


def test_examples_show_what_answers_depend_on_and_what_is_read(full_run: Path, edit_evaluation: Edit) -> None:
    forget_training(full_run)
    relevance, read = np.zeros((2, 9, 9), int)
    relevance[2, 3], read[8, 8] = 100, 100
    layers = [{"layer": 1, "on_tile": 1.0, "patches": read.tolist()}]

    def add(evaluation: dict[str, Any]) -> None:
        evaluation["examples"][1] |= {"relevance": relevance.tolist(), "attention": layers, "right": False}
        evaluation["examples"][0] |= {"relevance": [[0, 1], [2]], "attention": []}  # not a map
        evaluation["examples"][2]["attention"] = [layers[0], {**layers[0], "layer": 4, "on_tile": 0.25}]

    edit_evaluation(add)
    _, page = report_of(full_run)
    routes = page.section("routes")
    assert "gradient times input" in routes and "mean over layers" in routes and "layer 4: 25.0 % here" in routes
    assert routes.count("✗ wrong:") == 2 and routes.count("✓ right:") == 18  # one by its text, one by its score
    assert len(page.pictures("png")) == 20 + 2 + 3
    by_task = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) for data in page.pictures("png")]
    place = next(
        i for i, picture in enumerate(by_task) if i and np.ptp(by_task[i], axis=2).max() > 0 and is_gray(picture)
    )
    plain, depends, reads = by_task[place - 1 : place + 2]
    gray = np.asarray(Image.fromarray(plain.astype(np.uint8)).convert("L"), float)[..., None]
    marked = gray * (1 - STRONGEST) + MARK * STRONGEST
    np.testing.assert_allclose(depends[16:24, 24:32], marked[16:24, 24:32], atol=1)
    np.testing.assert_allclose(reads[64:, 64:], marked[64:, 64:], atol=1)
    np.testing.assert_allclose(depends[:16], np.broadcast_to(gray, depends.shape)[:16], atol=1)


def is_gray(picture: np.ndarray) -> bool:
    """Whether most of a picture has no color."""
    return bool((np.ptp(picture, axis=2) == 0).mean() > 0.9)


def test_without_controls_their_section_is_missing(full_run: Path) -> None:
    forget_training(full_run)
    _, page = report_of(full_run)
    assert "controls" not in page.sections and "By kind" not in page.text and "±" not in page.section("accuracy")


def test_a_complete_run(full_run: Path) -> None:
    html, page = report_of(full_run)
    # The numbers that count, both savings among them: 0.0702 / 0.0171 and 0.0747 / 0.0216.
    header = page.section("header")
    for text in ("almanac, test split, 1000 questions", "54 % of the full", "4.11x", "3.46x", "99.0 %", "-0.3 points"):
        assert text in header
    assert page.text.count("Not run") == 1 and "Not run" in page.section("benchmarks")
    # It needs no other files.
    assert set(page.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "div", "figure", "figcaption"),
        *(
            "h1",
            "h2",
            "h3",
            "h4",
            "nav",
            "ul",
            "li",
            "a",
            "p",
            "b",
            "i",
            "span",
            "code",
            "pre",
            "img",
            "br",
            "details",
            "summary",
        ),
        *("table", "thead", "tbody", "tr", "th", "td", "wbr"),
    }
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"://|@import|url\(", html)
    # Every figure is a drawing, every example a picture.
    drawings = page.pictures("svg+xml")
    assert len(drawings) == 3 + 2 * 5  # cost, routes, labels; loss and accuracy of five stages
    for drawing in drawings:
        root = xml.etree.ElementTree.fromstring(drawing)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5
        assert not re.search(rb"(href|src)=\"(?!#)", drawing)
    assert len(page.pictures("png")) == 20
    # Content of the other files.
    assert "8 subsets of the slots were evaluated" in page.section("search")
    assert page.section("search").count("viable") == 4 + 1
    assert "1700 41.5" in page.section("labels") and "reaches 99 %" in page.section("labels")
    assert "5 min 02 s" in page.section("time") and "6 min 11 s" in page.section("time")
    assert "differ by at most 3.1e-06 (allowed: 1e-05)" in page.section("export")
    assert "with local changes" in page.section("reproduce") and "model.text.num_layers" in page.section("reproduce")
    assert "300 steps, each point a mean of 6; 1 step not finite" in page.section("training")
    assert "4 budgets, one drawn for each step" in page.section("training")
    # The picture for the README.
    with Image.open(full_run / "report" / "accuracy_cost.png") as picture:
        assert picture.width > 2 * picture.height > 1000
        assert np.asarray(picture.convert("L")).std() > 10


def test_what_was_not_run_is_said(full_run: Path, edit_evaluation: Callable[..., None]) -> None:
    for path in full_run.iterdir():
        if path.name != "eval":
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def only_two_budgets(evaluation: dict[str, Any]) -> None:
        for name in ("dial", "routes", "examples"):
            del evaluation[name]
        evaluation["budgets"] = {name: evaluation["budgets"][name] for name in ("empty", "full")}

    edit_evaluation(only_two_budgets)
    _, page = report_of(full_run)
    assert "of the full budget's FLOPs: not run" in page.section("header")
    for name in ("accuracy", "benchmarks", "routes", "training", "search", "labels", "time", "export", "reproduce"):
        assert "Not run" in page.section(name), name
    assert page.section("routes").count("Not run") == 2  # routes and examples
    assert "answered right with full" in page.section("header")


def test_stages_that_were_asked_for_and_those_that_stopped(full_run: Path) -> None:
    forget_training(full_run)
    folder = full_run / "warmup"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "budget": "full"}\n{"step": 2, "loss"')
    training = report_of(full_run)[1].section("training")
    assert "warmup 1 steps, not complete" in training
    for stage in ("base", "full", "universal", "policy"):
        assert f"{stage} Not run" in training
    assert "search" not in training and "dense" not in training  # not a trained stage; not requested


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "</style></main>&lt;b&gt;",
    "half a pair \ud83d, NUL \x00, bell \x07",
)


def test_text_from_data_sets_stays_text(full_run: Path, edit_evaluation: Callable[..., None]) -> None:
    forget_training(full_run)
    tags = sorted(report_of(full_run)[1].tags)

    def inject(evaluation: dict[str, Any]) -> None:
        for text, example in zip(HOSTILE, evaluation["examples"], strict=False):
            task = example["task"]
            evaluation["levels"][text] = evaluation["levels"].pop(task)
            evaluation["routes"][text] = evaluation["routes"].pop(task)
            for row in evaluation["budgets"].values():
                row["tasks"][text] = row["tasks"].pop(task)
            for other in evaluation["examples"]:
                other["task"] = text if other["task"] == task else other["task"]
            example.update(question=text, answer=text, prediction=text)

    edit_evaluation(inject)
    record = json.loads((full_run / "config.json").read_text())
    record["config"] |= {"name": HOSTILE[0], "seed": HOSTILE[1], "model": {HOSTILE[4]: HOSTILE[5]}}
    (full_run / "config.json").write_text(json.dumps(record))
    html, page = report_of(full_run)
    assert "<script" not in html and not page.handlers
    assert sorted(set(page.tags)) == sorted(set(tags))
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    everything = "".join(page.sections.values())
    for text in HOSTILE:  # in the accuracy table, as question and prediction, as task of two examples
        assert everything.count(text.encode("utf-8", "replace").decode()) >= 5
    for drawing in page.pictures("svg+xml"):
        xml.etree.ElementTree.fromstring(drawing)


def test_pictures_come_only_from_the_evaluation(full_run: Path, edit_evaluation: Callable[..., None]) -> None:
    forget_training(full_run)
    secret = full_run.parent / "secret.png"
    Image.new("RGB", (9, 9), "red").save(secret)
    (full_run / "eval" / "examples" / "link.png").symlink_to(secret)
    (full_run / "eval" / "examples" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    names = ["../../secret.png", str(secret), "examples/link.png", "examples/missing.png", "examples/broken.png"]

    def lead_away(evaluation: dict[str, Any]) -> None:
        evaluation["examples"] = evaluation["examples"][: len(names)]
        for example, name in zip(evaluation["examples"], names, strict=True):
            example["image"] = name

    edit_evaluation(lead_away)
    _, page = report_of(full_run)
    assert page.pictures("png") == page.pictures("jpeg") == []
    assert page.section("routes").count("no picture") == len(names)


def test_small_pictures_are_kept_and_large_ones_shrunk() -> None:
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (*size, 3), np.uint8) for size in ((72, 72), (700, 1400)))
    data, kind = embedded(small)
    with Image.open(io.BytesIO(data)) as image:
        assert kind == "png"
        np.testing.assert_array_equal(np.asarray(image), small)
    data, kind = embedded(large)
    with Image.open(io.BytesIO(data)) as image:
        assert kind == "jpeg" and image.size == (PICTURE, PICTURE // 2)


@pytest.mark.parametrize("saving", [1, 3], ids=["all tokens", "packed tokens"])
def test_a_dense_model_is_not_said_to_be_missing(
    saving: int, full_run: Path, edit_evaluation: Callable[..., None]
) -> None:
    forget_training(full_run)

    def dense(evaluation: dict[str, Any]) -> None:
        for name in ("dial", "routes", "examples"):
            del evaluation[name]
        costs = {name: value / saving for name, value in evaluation["dense"].items()}
        evaluation["budgets"] = {"full": {**evaluation["budgets"]["full"], **costs}}
        if saving > 1:  # without it the cost says so, in results of earlier versions
            evaluation["plan"] = "dense"

    edit_evaluation(dense)
    page = report_of(full_run)[1]
    assert f"{saving}.00x" in page.section("header") and "A dense vision-language model" in page.section("header")
    assert "no dense decoder was run" not in page.text and "No dense model was run" not in page.text
    assert "not run" not in page.section("accuracy").replace("Not", "")


def test_data_without_levels_or_tasks(full_run: Path, edit_evaluation: Callable[..., None]) -> None:
    forget_training(full_run)

    def plain(evaluation: dict[str, Any]) -> None:
        evaluation.update(benchmark="llava", levels={}, routes={"all": {"empty": 0.5, "full": 0.5}}, examples=[])
        for row in evaluation["budgets"].values():
            row.update(easy=None, hard=None, tasks={"all": 0.625})
        for point in evaluation["dial"]:
            point.update(easy=None, hard=None, accuracy=0.625)

    edit_evaluation(plain)
    page = report_of(full_run)[1]
    assert "62.5 %" in page.section("header") and "±0.0 points" in page.section("header")
    assert "easy" not in page.section("header") and "mean of" not in page.section("accuracy")


def test_a_search_that_stopped_subsets_says_so(full_run: Path) -> None:
    """Stopped subsets may lack the tasks of a level; the columns are those of the others."""
    path = full_run / "search" / "viable.json"
    search = json.loads(path.read_text())
    for row in search["subsets"]:
        row |= {"questions": 512, "better": None}
    for row, better in zip((search["subsets"][1], search["subsets"][4]), ("0b100", "0b110"), strict=True):
        row |= {"questions": 64, "better": better, "hard": None}
    path.write_text(json.dumps(search))
    shown = report_of(full_run)[1].section("search")
    assert "2 were not asked all questions" in shown and "hard, %" in shown
    assert "64 0b100 is better" in shown and "64 0b110 is better" in shown
    assert shown.count("512") == 6 and DASH in shown


def test_without_an_evaluation_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"eval/test\.json: no such file; .*visor evaluate --workdir="):
        write_report(Workdir(tmp_path))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("eval/test.json", "{", "not valid JSON"),
        ("eval/test.json", "[]", "holds \\[\\]; expected an object"),
        (
            "eval/test.json",
            '{"benchmark": "", "split": "", "budgets": {}, "dense": {}}',
            "field dense.decoder_gflops is missing",
        ),
        ("search/viable.json", '{"viable": []}', "field subsets is missing"),
        ("labels/labels.json", "7", "holds 7; expected an object"),
        ("export/parity.json", "{}", "field bound is missing"),
        ("goodput.json", "null", "expected an object"),
        ("config.json", "{}", "field config is missing"),
    ],
)
def test_damaged_files_are_named(full_run: Path, file: str, text: str, message: str) -> None:
    (full_run / file).write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        write_report(Workdir(full_run))
    assert str(full_run / file) in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_as_text() -> None:
    assert [percent(0.98765), percent(None)] == ["98.8", DASH]
    assert [points(0.003), points(0.0001), points(None)] == ["+0.3 points", "±0.0 points", DASH]
    assert points(-0.02) == f"{MINUS}2.0 points"
    assert [times(4.108), times(1.0), times(37.04)] == [f"4.11{TIMES}", f"1.00{TIMES}", f"37.0{TIMES}"]
    assert [flops(0.0131, 0.07), flops(0.0131, 0.9)] == ["13.10", "13.10"]  # MFLOP
    assert [flops(250.0, 600.0), flops(7560.0, 7600.0)] == ["250", "7.56"]  # GFLOP, TFLOP
    assert [duration(3.21), duration(301.5), duration(7261)] == ["3.2 s", "5 min 02 s", "2 h 01 min"]


def test_headings_tables_pictures_and_keys_for_those_who_cannot_see_or_point(full_run: Path) -> None:
    """Headings without gaps, header cells with a scope, pictures with a text, scrolling boxes that take the focus."""
    forget_training(full_run)
    html, page = report_of(full_run)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    by_tag: dict[str, list[dict[str, str | None]]] = {}
    for tag, given in page.elements:
        by_tag.setdefault(tag, []).append(given)
    assert {one.get("scope") for one in by_tag["th"]} == {"col", "row"}
    assert all(one.get("alt") for one in by_tag["img"])
    assert len(by_tag["main"]) == len(by_tag["nav"]) == 1 and by_tag["nav"][0].get("aria-label")
    boxes = [one for one in by_tag["div"] if one.get("class") == "scroll"]
    assert len(boxes) == len(by_tag["table"])
    assert all((one.get("role"), one.get("tabindex")) == ("region", "0") and one.get("aria-label") for one in boxes)
    assert len({one["aria-label"] for one in boxes}) == len(boxes)
    ids = [given["id"] for _, given in page.elements if "id" in given]
    targets = [(one.get("href") or "").removeprefix("#") for one in by_tag["a"]]
    assert len(ids) == len(set(ids)) and targets[0] == "main" and set(targets) <= set(ids)
