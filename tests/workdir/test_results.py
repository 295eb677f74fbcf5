"""Changed files of a workdir are refused by name or recomputed; never accepted, and never a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.adapt.label import write
from visor_jax.config import as_config
from visor_jax.data.draws import index_range
from visor_jax.data.sample import SkipSample
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json
from visor_jax.report.facts import read_facts
from visor_jax.testing import tiny_config
from visor_jax.train.objectives.policy import LabeledExamples
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.goodput import Goodput
from visor_jax.workdir.metrics_log import drop_rows, read_rows
from visor_jax.workdir.results import Labels, read_viable

NESTED, DIGITS = "[" * 100_000, '{"seconds": ' + "9" * 5000 + "}"
VIABLE = [(False, False), (True, False), (True, True)]
ROW = {"tasks": {"bg": 1.0}, "easy": 1.0, "hard": None, "decoder_gflops": 0.5, "end_to_end_gflops": 0.75, "samples": 4}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with every result file, with invented numbers; tests must not change it."""
    path = tmp_path_factory.mktemp("made") / "run"
    workdir, config = Workdir(path), tiny_config()
    workdir.claim(config)
    subsets = [{"budget": "0b00", "accuracy": 0.5, "loss": 1.0, "decoder_gflops": 0.5, "easy": 0.5, "hard": 0.5}]
    actual = {"num_slots": 2, "viable": ["0b00", "0b10", "0b11"], "subsets": subsets}
    write_json(path / "search" / "viable.json", {**actual, "identity": workdir.identity(config, "search")})
    count = 5
    labels = Labels(
        VIABLE,
        np.arange(count) % 3,
        -np.ones((3, count), np.float32).T,  # in scoring's memory order, which is transposed
        index_range("label")[1].start + np.arange(count) // 2,
        np.arange(count) % 2,
        np.full(count, 17),
    )
    write(workdir, labels, ["bg"] * count, 0.01, SkipLog(), workdir.identity(config, "label"))
    evaluation = {"benchmark": "almanac", "split": "test", "stage": "policy", "budgets": {"full": ROW, "auto": ROW}}
    evaluation |= {"dense": {"decoder_gflops": 1.0, "end_to_end_gflops": 1.5}, "levels": {"bg": "easy"}}
    evaluation |= {"identity": workdir.identity(config, "evaluate", model="policy")}
    write_json(path / "eval" / "test.json", evaluation)
    write_json(path / "goodput.json", {"step": 2.5, "compile": 1.0})
    write_json(
        path / "export" / "parity.json", {"bound": 1e-5, "max_logit_difference": 0.0, "greedy_tokens_equal": True}
    )
    (path / "full").mkdir()
    rows = [{"step": n, "loss": 1.0, "budget": "full", "accuracy/bg": 0.5, "seconds": 0.1} for n in (1, 2, 3)]
    (path / "full" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_what_nobody_changed_is_read(run: Path) -> None:
    workdir = Workdir(run)
    assert read_viable(workdir, 2) == VIABLE
    assert len(LabeledExamples(as_config(tiny_config()), Labels.read(workdir)).places) == 5
    assert read_facts(workdir).goodput == {"step": 2.5, "compile": 1.0}
    assert len(read_rows(run / "full" / "metrics.jsonl")) == 3


# --- tampering --------------------------------------------------------------------------------------------------------


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; "__" in a name is a dot; None removes a field."""
    tree = json.loads(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        inner = tree
        for part in parents:
            inner = inner[part]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    path.write_text(json.dumps(tree))


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def spoil(name: str) -> dict[str, Callable[[Path], object]]:
    """Ways to damage any JSON file."""
    return {
        f"{name}: empty": lambda run: (run / name).write_text(""),
        f"{name}: nested": lambda run: (run / name).write_text(NESTED),
        f"{name}: 5000 digits": lambda run: (run / name).write_text(DIGITS),
        f"{name}: a list": lambda run: (run / name).write_text("[1]"),
        f"{name}: huge": lambda run: os.truncate(run / name, 2**40),
        f"{name}: a FIFO": lambda run: replace(run / name, os.mkfifo),
        f"{name}: a device": lambda run: replace(run / name, lambda path: path.symlink_to("/dev/zero")),
        f"{name}: a folder": lambda run: replace(run / name, Path.mkdir),
    }


def save_arrays(run: Path, header: bytes | None = None, compressed: bool = False, **arrays: Any) -> None:
    """Rewrites labels.npz with other arrays; None drops one, `header` replaces the header."""
    path = run / "labels" / "labels.npz"
    with np.load(path) as saved:
        merged = {**{name: saved[name] for name in saved}, **arrays}
    present = {name: array for name, array in merged.items() if array is not None}
    (np.savez_compressed if compressed else np.savez)(path, **present)
    if header is not None:
        forged, old = io.BytesIO(), zipfile.ZipFile(path)
        with zipfile.ZipFile(forged, "w") as archive:
            for info in old.infolist():
                archive.writestr(info.filename, header if info.filename == "label.npy" else old.read(info))
        path.write_bytes(forged.getvalue())


def giant_header() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    return buffer.getvalue()


def edit_identity(run: Path, **fields: Any) -> None:
    with np.load(run / "labels" / "labels.npz") as saved:
        identity = json.loads(str(saved["identity"]))
    save_arrays(run, identity=np.array(json.dumps({**identity, **fields})))


def other_viable(run: Path) -> None:
    change(run / "search/viable.json", viable=["0b00", "0b01", "0b11"])


LABEL = np.arange(5) % 3
OTHER_SEED = {"config": {**dict.fromkeys(["name"], "x"), "seed": 1}}
REFUSED: dict[str, Callable[[Path], object]] = {
    **spoil("config.json"),
    "config.json: another format": lambda run: change(run / "config.json", format=2),
    "config.json: data of numbers": lambda run: change(run / "config.json", data={"data": 3}),
    **spoil("search/viable.json"),
    "viable: slots of another model": lambda run: change(run / "search/viable.json", num_slots=3),
    "viable: a million slots": lambda run: change(run / "search/viable.json", num_slots=10**6),
    "viable: slots below 0": lambda run: change(run / "search/viable.json", num_slots=-2),
    "viable: duplicates": lambda run: change(run / "search/viable.json", viable=["0b00", "0b00", "0b11"]),
    "viable: without the full budget": lambda run: change(run / "search/viable.json", viable=["0b00", "0b10"]),
    "viable: dearest first": lambda run: change(run / "search/viable.json", viable=["0b11", "0b10", "0b00"]),
    "viable: 9 slots": lambda run: change(run / "search/viable.json", viable=["0b000000000"]),
    "viable: no budget": lambda run: change(run / "search/viable.json", viable=["zz"]),
    "viable: missing": lambda run: change(run / "search/viable.json", viable=None),
    "viable: of another seed": lambda run: change(run / "search/viable.json", identity__config__seed=1),
    "viable: an identity of text": lambda run: change(run / "search/viable.json", identity="mine"),
    "labels: of other viable budgets": other_viable,
    "labels: index 99": lambda run: save_arrays(run, label=LABEL + 97),
    "labels: index -1": lambda run: save_arrays(run, label=LABEL - 1),
    "labels: floats": lambda run: save_arrays(run, label=LABEL.astype(np.float64)),
    "labels: objects": lambda run: save_arrays(run, label=LABEL.astype(object)),
    "labels: one dimension more": lambda run: save_arrays(run, label=LABEL[:, None]),
    "labels: none": lambda run: save_arrays(
        run, log_likelihood=np.zeros((0, 3)), label=LABEL[:0], picture_index=LABEL[:0], turn=LABEL[:0],
        num_visual=LABEL[:0],
    ),
    "labels: one label less": lambda run: save_arrays(run, label=LABEL[:4]),
    "labels: one turn less": lambda run: save_arrays(run, turn=LABEL[:4]),
    "labels: one size less": lambda run: save_arrays(run, num_visual=LABEL[:4]),
    "labels: a size of -1": lambda run: save_arrays(run, num_visual=LABEL - 1),
    "labels: turn 99": lambda run: save_arrays(run, turn=np.full(5, 99)),
    "labels: turn -1": lambda run: save_arrays(run, turn=np.full(5, -1)),
    "labels: picture 2**62": lambda run: save_arrays(run, picture_index=np.full(5, 2**62)),
    "labels: picture -1": lambda run: save_arrays(run, picture_index=np.full(5, -1)),
    "labels: likelihoods of NaN": lambda run: save_arrays(run, log_likelihood=np.full((5, 3), np.nan)),
    "labels: likelihoods of 2 budgets": lambda run: save_arrays(run, log_likelihood=np.zeros((5, 2))),
    "labels: budgets zz": lambda run: save_arrays(run, budgets=np.array(["zz", "0b10", "0b11"])),
    "labels: budgets of 9 slots": lambda run: save_arrays(run, budgets=np.array(["0b000000000"] * 3)),
    "labels: a header of 10**12": lambda run: save_arrays(run, header=giant_header()),
    "labels: a header cut short": lambda run: save_arrays(run, header=giant_header()[:20]),
    "labels: an array missing": lambda run: save_arrays(run, turn=None),
    "labels: compressed": lambda run: save_arrays(run, compressed=True),
    "labels: of another seed": lambda run: edit_identity(run, **OTHER_SEED),
    "labels: of other data": lambda run: [
        change(run / "config.json", data={"train": "a" * 64}), edit_identity(run, data="b" * 64)
    ],
    "labels: of another stage": lambda run: edit_identity(run, stage="policy"),
    "labels: no identity": lambda run: save_arrays(run, identity=np.array("[]")),
    "labels: a nested identity": lambda run: save_arrays(run, identity=np.array(NESTED)),
    "labels: no zip": lambda run: (run / "labels/labels.npz").write_bytes(b"PK"),
    "labels: a pickle": lambda run: (run / "labels/labels.npz").write_bytes(b"\x80\x04N."),
    "labels: a FIFO": lambda run: replace(run / "labels/labels.npz", os.mkfifo),
    "labels: huge": lambda run: os.truncate(run / "labels/labels.npz", 2**40),
    **spoil("labels/labels.json"),
    "labels.json: counts of text": lambda run: change(run / "labels/labels.json", counts={"full": "many"}),
    **spoil("eval/test.json"),
    "test.json: no budgets": lambda run: change(run / "eval/test.json", budgets={}),
    "test.json: an accuracy of 7": lambda run: change(run / "eval/test.json", budgets__full__tasks={"bg": 7}),
    "test.json: a cost of 0": lambda run: change(run / "eval/test.json", dense__decoder_gflops=0),
    "test.json: a cost of 1e999": lambda run: (run / "eval/test.json").write_text(
        (run / "eval/test.json").read_text().replace("1.5", "1e999")
    ),
    "test.json: routes of text": lambda run: change(run / "eval/test.json", routes="x"),
    "test.json: examples of numbers": lambda run: change(run / "eval/test.json", examples=[1]),
    "test.json: made with other settings": lambda run: change(run / "config.json", config__evaluate__samples=8),
    "test.json: of another seed": lambda run: change(run / "eval/test.json", identity__config__seed=1),
    "test.json: of other viable budgets": lambda run: change(
        run / "eval/test.json", identity__inputs__viable=["0b00", "0b11"]
    ),
    **spoil("export/parity.json"),
    **spoil("goodput.json"),
    "goodput.json: text": lambda run: change(run / "goodput.json", step="soon"),
    "goodput.json: below 0": lambda run: change(run / "goodput.json", step=-1.0),
    "metrics.jsonl: a FIFO": lambda run: replace(run / "full/metrics.jsonl", os.mkfifo),
    "metrics.jsonl: huge": lambda run: os.truncate(run / "full/metrics.jsonl", 2**40),
    "lock.json: a folder": lambda run: (run / "lock.json").mkdir(),
    "lock.json: huge": lambda run: [(run / "lock.json").touch(), os.truncate(run / "lock.json", 2**40)],
}  # fmt: skip


def read_all(run: Path) -> None:
    """Reads the results like stages, passes and the report."""
    workdir = Workdir(run)
    workdir.config()
    read_viable(workdir, 2)
    LabeledExamples(as_config(tiny_config()), Labels.read(workdir))
    read_facts(workdir)
    with workdir.lock():
        pass


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_somebody_changed_is_refused_by_name(run: Path, name: str) -> None:
    REFUSED[name](run)
    with pytest.raises(RequestError) as error:
        read_all(run)
    file = name.partition(":")[0]
    assert {"viable": "viable.json", "labels": "labels.npz"}.get(file, file) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", [*spoil("goodput.json"), "goodput.json: text", "goodput.json: below 0"])
def test_training_counts_its_time_again(run: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    REFUSED[name](run)
    assert Goodput(run / "goodput.json").seconds == {}
    assert "counting starts again" in caplog.text


ROWS = {
    "seconds of text": '{"step": 2, "loss": 1.0, "seconds": "soon"}',
    "a step below 0": '{"step": -2, "loss": 1.0}',
    "a step beyond numbers": '{"step": ' + "9" * 30 + "}",
    "5000 digits": '{"step": ' + "9" * 5000 + "}",
    "nested": NESTED,
    "an accuracy of text": '{"step": 2, "accuracy/bg": "good"}',
    "a loss of 1e999": '{"step": 2, "loss": 1e999}',
    "a list": "[2]",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_line_that_no_stage_writes_is_left_out(run: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = run / "full" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], ROWS[name], lines[2]]) + "\n")
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    assert "line 2 is damaged and skipped" in caplog.text
    assert drop_rows(path, 3) == 0.1


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith("config.json")])
def test_a_config_json_that_somebody_changed_is_refused_before_a_run_touches_it(run: Path, name: str) -> None:
    REFUSED[name](run)
    with pytest.raises(RequestError, match=r"config\.json"), Workdir(run).claimed(tiny_config()):
        pass


SKIPPED = {
    "a FIFO": os.mkfifo,
    "huge": lambda path: [path.touch(), os.truncate(path, 2**40)],
    "a folder": Path.mkdir,
    "nested": lambda path: path.write_text(NESTED + "\n"),
    "5000 digits": lambda path: path.write_text(DIGITS + "\n"),
    "of other types": lambda path: path.write_text('{"source": [], "index": {}, "reason": 1}\n[]\n'),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_log_of_skipped_records_that_somebody_changed(run: Path, name: str) -> None:
    (run / "data").mkdir()
    path = run / "data" / "skipped.jsonl"
    SKIPPED[name](path)
    log = SkipLog(path)
    if name in ("a FIFO", "huge", "a folder"):
        with pytest.raises(RequestError, match=r"skipped\.jsonl: cannot be read"):
            log.count_skipped("set", 1, SkipSample("bad_json"))
        return
    log.count_skipped("set", 1, SkipSample("bad_json"))
    assert json.loads(path.read_text().splitlines()[-1])["index"] == 1


LOCKS = [
    "",
    NESTED[:60_000],
    '{"host": ["x"], "pid": 1, "token": "t"}',
    '{"host": "x", "pid": "1", "token": "t"}',
    DIGITS,
    "[]",
]


@pytest.mark.parametrize("content", LOCKS, ids=range(len(LOCKS)))
def test_a_lock_that_no_run_can_have_written_holds_nobody(run: Path, content: str) -> None:
    (run / "lock.json").write_text(content)
    with Workdir(run).lock():
        assert read_json(run / "lock.json")["pid"] == os.getpid()
