"""`accelerator.sh`: every part writes its file, a failing one stops no other; docs/hardware.md is that of the files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from visor_jax.errors import RequestError
from visor_jax.kernels.attention import api
from visor_jax.scale.mesh import build_mesh
from visor_jax.train.ahead import abstract_step

importlib.import_module("visor_jax.train.ahead")  # before the fixture `quick` changes what optax compiles

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.sh"
PARTS = ("kernels", "step", "prefill", "memory", "specialize")
pytestmark = pytest.mark.usefixtures("script")


def imported(name: str) -> Any:
    return importlib.import_module(name)


def started(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, **environment}
    command = ["bash", str(SCRIPT), str(out), "--tiny", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)


def reports(out: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (out / "accelerator").glob("*.json")}


@pytest.mark.parametrize("part", ["step", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_part_writes_its_rows(tmp_path: Path, quick: None, part: str) -> None:
    imported("accelerator").main([part, "--tiny", f"--out={tmp_path / 'part.json'}"])
    report = json.loads((tmp_path / "part.json").read_text())
    assert report["status"] == "done" and report["part"] == part and report["devices"] >= 1
    assert [row["budget"] for row in report["rows"]] == ["empty", "2 slots", "full"]
    for row in report["rows"]:
        assert row["loss"] > 0
        assert (
            row["seconds"] > 0 and row["teraflops"] > 0 and "mfu" not in row if part == "step" else row["program_bytes"]
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "names", "kernel"),
    [
        ("cuda", ("cudnn", "pallas_gpu", "xla_chunked"), {"cudnn": "__cudnn", "pallas_gpu": "triton"}),
        ("tpu", ("splash", "pallas_tpu", "xla_chunked"), dict.fromkeys(("splash", "pallas_tpu"), "tpu_custom_call")),
    ],
)
def test_what_runs_on_accelerators_lowers_for_them(
    platform: str, names: tuple[str, ...], kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel at every shape of the script, and the training step, as far as the compiler of the device."""
    monkeypatch.setattr(api, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    attention, accelerator = imported("attention"), imported("accelerator")
    for case in ("0.5B joint", "7B joint", "0.5B cross", "7B cross"):
        shape = attention.GPU_SHAPES[case]
        arrays, mask = jax.eval_shape(partial(attention.arrays_of, shape, jnp.bfloat16))
        for name in names:
            for gradients in (False, True):
                program = jax.jit(attention.program(name, shape, gradients=gradients))
                text = program.trace(*arrays, mask).lower(lowering_platforms=(platform,)).as_text()
                assert kernel.get(name, "stablehlo.while") in text, (case, name, gradients)
    config, _ = accelerator.step_config(False, 4)
    mesh = build_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = abstract_step(config, "full", mesh)
    with jax.set_mesh(mesh):
        traced: Any = step.update
        text = traced.trace(*step[1:]).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(kernel[names[0]]) >= 10, "the kernels of the platform, forward and backward"


def test_splash_with_a_fixed_mask_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline of causal shapes on TPUs, interpreted."""
    attention = imported("attention")
    shape = attention.Shape(2, 40, 200, 4, 2, 64, True)
    (q, k, v), mask = attention.arrays_of(shape, jnp.float32)
    out = attention.splash_causal(q, k, v, interpret=True)
    np.testing.assert_allclose(out, api.attention(q, k, v, mask=mask, implementation="xla"), atol=2e-5)


@pytest.mark.slow
def test_the_whole_script_at_tiny_shapes(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert run.returncode == 0, run.stderr
    found = reports(tmp_path)
    assert {*found} == {*PARTS} and all(report["status"] == "done" and report["rows"] for report in found.values())
    assert [line.split(":")[0] for line in run.stdout.splitlines()[-5:]] == list(PARTS)


def test_parts_that_exceed_their_limit_are_named_and_the_others_still_run(tmp_path: Path) -> None:
    run = started(tmp_path, "--limit=0.3")
    assert run.returncode == 1
    assert {part: report["status"] for part, report in reports(tmp_path).items()} == dict.fromkeys(PARTS, "failed")
    assert run.stdout.splitlines() == [f"{part}: failed: took longer than 0.3 s" for part in PARTS]


@pytest.mark.parametrize("argument", ["--parts=kernel", "--parts=", "--limit=abc", "--limit=0", "--fast", "second"])
def test_a_wrong_argument_is_refused_before_anything_runs(tmp_path: Path, argument: str) -> None:
    run = started(tmp_path / "out", argument)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and argument in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_failed_keeps_what_it_had_measured(tmp_path: Path) -> None:
    files = imported("accelerator_files")
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"part": "step", "status": "running", "rows": [{"budget": "empty"}]}))
    files.mark_failed(file, "step", 1, "9")
    report = json.loads(file.read_text())
    assert report["rows"] == [{"budget": "empty"}] and report["reason"] == "ended with status 1; its output says why"


def test_what_does_not_fit_into_the_limit_is_left_out_and_named(tmp_path: Path) -> None:
    report = imported("accelerator").Report("kernels", tmp_path / "kernels.json", tiny=False, limit=100.0)
    assert report.has_time(50.0, "a case") and not report.has_time(101.0, "a long case")
    report.facts |= {"device": "NVIDIA H200", "devices": 1, "jax": "0.10.2"}
    report.write("done")
    assert json.loads((tmp_path / "kernels.json").read_text())["left_out"] == ["a long case"]
    assert "Left out for want of time: a long case." in imported("hardware_page").page(tmp_path)


def test_limits_fit_into_nine_minutes() -> None:
    limits = SCRIPT.read_text().split("<<'PARTS'\n")[1].split("\nPARTS")[0]
    assert [line.split()[0] for line in limits.splitlines()] == list(PARTS)
    assert sum(int(line.split()[1]) for line in limits.splitlines()) <= 9 * 60 - 10


def test_the_page_is_that_of_the_files() -> None:
    page = imported("hardware_page")
    assert page.PAGE.read_text() == page.page(ROOT / "benchmarks" / "results" / "accelerator")


def test_the_page_shows_figures_failures_and_what_was_not_run(tmp_path: Path) -> None:
    page = imported("hardware_page")
    assert "Not run on hardware yet" in page.page(tmp_path)
    facts = {"device": "NVIDIA H200", "devices": 1, "jax": "0.10.2", "tiny": False, "seconds": 9.0}
    row = {"budget": "full", "rows": 4, "seconds": 1.23456, "teraflops": 400.0, "mfu": 0.4321}
    step = {"part": "step", "status": "failed", "reason": "took longer than 165 s", **facts, "rows": [row]}
    (tmp_path / "step.json").write_text(json.dumps(step))
    text = page.page(tmp_path)
    assert "1 x NVIDIA H200" in text and "| full | 4 | 1.235 | 400 | 0.4321 |" in text
    assert "**Failed**: took longer than 165 s" in text and text.count("Not run on hardware yet.") == 4
    (tmp_path / "step.json").write_text(json.dumps({**step, "tiny": True}))
    with pytest.raises(RequestError, match="--tiny"):
        page.page(tmp_path)
