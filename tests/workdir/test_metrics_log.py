"""Rows of metrics.jsonl: every step is in the file exactly once, also after interruptions."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from visor_jax.train.metrics import MetricsWriter
from visor_jax.workdir.metrics_log import read_rows


def write(folder: Path, steps: range) -> MetricsWriter:
    with MetricsWriter(folder, first_step=steps.start) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1.0 / step, "budget": "full", "seconds": 0.5})
    return writer


def test_a_resumed_run_has_each_step_once(tmp_path):
    write(tmp_path, range(1, 8))
    writer = write(tmp_path, range(5, 10))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert writer.lost_seconds == 1.5


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), resume=st.integers(1, 8))
def test_a_file_cut_anywhere_resumes_whole(tmp_path_factory, cut, resume):
    folder = tmp_path_factory.mktemp("stage")
    path = folder / "metrics.jsonl"
    write(folder, range(1, 8))
    path.write_bytes(path.read_bytes()[:cut])
    before = [row["step"] for row in read_rows(path)]
    write(folder, range(resume, 10))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [step for step in before if step < resume] + list(range(resume, 10))


def test_a_line_that_is_no_row_is_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"loss": 1}\n[]\n\xff\n')
    write(tmp_path, range(3, 4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert caplog.text.count("damaged") == 3
