"""A model with each reduction trains and answers on fewer visual tokens, which its costs count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture
from visor_jax.cost import decoder_flops, visual_flops
from visor_jax.errors import RequestError
from visor_jax.export.torch_export import export
from visor_jax.loading import load
from visor_jax.testing import random_picture, tiny_config
from visor_jax.workdir.metrics_log import read_rows

KEPT = {"m3": 10, "divprune": 10, "vispruner": 9, "visionzip": 10, "hired": 10}  # of 36 patches and a newline


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("vispruner", "visor"),
        *(pytest.param(method, "dense", marks=pytest.mark.slow) for method in KEPT),
    ],
)
def test_it_trains_and_answers_on_fewer_tokens(method: str, plan: str, tmp_path: Path, quick: None) -> None:
    stage = "dense" if plan == "dense" else "full"
    config = tiny_config(
        {
            "model.plan": plan, "model.reduction.method": method, "model.reduction.ratio": 0.25,
            "data.visual_length": 12, "stages": (stage,), f"stage_overrides.{stage}.init_from": "",
        },
        steps=2,
    )  # fmt: skip
    run_stages(config, str(tmp_path), [stage])
    rows = read_rows(tmp_path / stage / "metrics.jsonl")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)

    model, picture, question = load(tmp_path), random_picture(96, 96), "Which color?"
    assert model.arch.reduction == architecture(config, stage).reduction
    size = model._prompt(picture, question).size
    assert size.visual == KEPT[method]
    answer = model.answer(picture, question, budget="full", max_new_tokens=1)
    bits = () if plan == "dense" else (True, True)
    assert answer.decoder_flops == pytest.approx(decoder_flops(model.arch, bits, size.visual, size.text))
    assert answer.flops - answer.decoder_flops == pytest.approx(visual_flops(model.arch, 1, size.visual))
    with pytest.raises(RequestError, match=rf"export: model.reduction.method='{method}'; expected 'none'"):
        export(model, tmp_path / "export", stage=stage)
