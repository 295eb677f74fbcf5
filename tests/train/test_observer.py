"""The fields that describe a run: useful FLOPs, throughput, running losses, and what a resumed run writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from visor_jax.architecture import Architecture
from visor_jax.config import architecture
from visor_jax.cost import decoder_flops, route_flops, tower_flops
from visor_jax.data.collate import Content
from visor_jax.scale.mesh import configured_mesh
from visor_jax.scale.peaks import peak_flops
from visor_jax.testing import tiny_config
from visor_jax.train import observer as observing
from visor_jax.train.observer import MEASURED, Observer, RunningLosses
from visor_jax.train.stage import Step
from visor_jax.train.step_cost import StepCost
from visor_jax.train.update import State
from visor_jax.workdir.goodput import Goodput

SAMPLES = [[Content("a", 2, 30, 12), Content("b", 0, 0, 7)], [Content("a", 1, 10, 5)]]


class Sized:
    """Stands in for a parameter."""

    def __init__(self, size: int) -> None:
        self.size = size


def tiny_arch() -> Architecture:
    return architecture(tiny_config())


@pytest.mark.parametrize(
    ("trained", "tower", "decoder"),
    [
        (("vision/a", "connector/b", "blocks/c", "tail/d", "embed_tokens/e"), 3.0, 3.0),
        (("blocks/c",), 1.0, 2.25),
        (("connector/b",), 3.0, 2.0),
    ],
)
def test_frozen_parts_cost_less(trained: tuple[str, ...], tower: float, decoder: float) -> None:
    sizes = {"vision/a": 10, "connector/b": 10, "blocks/c": 10, "tail/d": 30, "embed_tokens/e": 99, "routing/f": 5}
    parts: Any = [{p: Sized(n) for p, n in sizes.items() if (p in trained) == wanted} for wanted in (True, False)]
    cost = StepCost.of(tiny_arch(), State(parts[0], parts[1], None), "answer")
    assert (cost.passes_tower, cost.passes_decoder) == (tower, decoder)


def test_the_flops_are_those_of_the_formulas_without_padding() -> None:
    arch = tiny_arch()
    bits = (True, *[False] * (arch.num_slots - 1))
    work = StepCost(arch, 3.0, 2.5).work(SAMPLES, bits)
    assert work[:4] == (3, 24, 40, 3)
    flops = sum(
        3.0 * tower_flops(arch, x.tiles) + 2.5 * decoder_flops(arch, bits, x.visual, x.text, num_logits=x.text)
        for row in SAMPLES
        for x in row
    )
    assert work.teraflops * 1e12 == pytest.approx(flops)
    routed = StepCost(arch, 1.0, 3.0, "policy").work([[SAMPLES[0][0]]], bits)
    assert routed.teraflops * 1e12 == pytest.approx(tower_flops(arch, 2) + 3.0 * route_flops(arch, 30, 12))


def test_rates_and_mfu_follow_from_the_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    mesh, cost = configured_mesh(config), StepCost(tiny_arch(), 3.0, 3.0)
    monkeypatch.setattr(observing, "peak_flops", lambda kind: 1e9)
    observer = Observer(cost, mesh, Goodput(tmp_path / "goodput.json"))
    step = Step(1, {}, (True,) * tiny_arch().num_slots, "full", [], [], contents=SAMPLES)
    row = observer.fields(step, 2.0, 0.5)
    assert row["samples_per_second"] == 6 and row["tokens_per_second"] == 128
    assert row["visual_tokens_per_second"] == 80 and row["tiles_per_second"] == 6
    flops = cost.work(SAMPLES, step.budget).teraflops * 1e12
    assert row["mfu"] == pytest.approx(flops / (0.5 * 1e9 * mesh.size))
    assert {*row} - {*MEASURED} == {"loss/budget=full"}


def test_running_losses_continue_after_a_resume() -> None:
    steps = [("full", 4.0), ("empty", 1.0), ("full", math.nan), ("full", 2.0), ("empty", 3.0)]
    whole, rows = RunningLosses(), []
    fields = [whole.add(budget, loss) for budget, loss in steps]
    assert fields == [
        {"loss/budget=full": 4.0},
        {"loss/budget=empty": 1.0},
        {"loss/budget=full": 4.0},
        {"loss/budget=full": 3.0},
        {"loss/budget=empty": 2.0},
    ]
    rows = [{"budget": budget, "loss": loss if math.isfinite(loss) else None} for budget, loss in steps[:3]]
    assert RunningLosses(rows).add("full", 2.0) == fields[3]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU7x", 1153.5e12), ("NVIDIA H200", 989e12), ("cpu", None)],
)
def test_the_peak_is_known_by_device_kind(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
