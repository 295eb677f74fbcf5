"""A model with each reduction trains and answers on fewer visual tokens, which its costs count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture
from visor_jax.cost import decoder_flops, visual_flops
from visor_jax.data.questions import label_questions
from visor_jax.errors import RequestError
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.scoring import score
from visor_jax.export.torch_export import export
from visor_jax.loading import load
from visor_jax.scale.mesh import build_mesh
from visor_jax.testing import random_params, random_picture, tiny_config
from visor_jax.workdir.metrics_log import read_rows

KEPT = {"m3": 10, "divprune": 10, "vispruner": 9, "visionzip": 10, "hired": 10}  # of 36 patches and a newline


REDUCED = {"model.reduction.ratio": 0.25, "data.visual_length": 12}


@pytest.mark.parametrize("method", ["visionzip", "hired"])
@pytest.mark.slow
def test_reduced_tokens_are_scored_from_stored_features_as_without(method: str, tmp_path: Path, quick: None) -> None:
    config = tiny_config({**REDUCED, "model.reduction.method": method, "label.samples": 8})
    arch, mesh = architecture(config), build_mesh(1, -1, 1)
    params, scores = random_params(arch), []
    for store in (None, FeatureStore(tmp_path, 10**9), FeatureStore(tmp_path, 10**9)):
        batches = label_questions(config).batches(8)
        scores.append(
            score(params, batches, [(False, False), (True, True)], arch, mesh=mesh, features=store, routed=True)
        )
    assert {*scores[0].num_visual.tolist()} == {KEPT[method]}
    assert len([*tmp_path.glob("*/*.safetensors")]) == 2
    for other in scores[1:]:
        np.testing.assert_allclose(other.log_likelihood, scores[0].log_likelihood, atol=1e-4)
        np.testing.assert_allclose(other.routes, scores[0].routes, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("vispruner", "visor"),
        *(pytest.param(method, "dense", marks=pytest.mark.slow) for method in KEPT),
    ],
)
@pytest.mark.slow
def test_it_trains_and_answers_on_fewer_tokens(method: str, plan: str, tmp_path: Path, quick: None) -> None:
    stage = "dense" if plan == "dense" else "full"
    config = tiny_config(
        {
            **REDUCED,
            "model.plan": plan,
            "model.reduction.method": method,
            "stages": (stage,),
            f"stage_overrides.{stage}.init_from": "",
        },
        steps=2,
    )
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
