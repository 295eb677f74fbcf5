"""Training at all scales of "m3": loss and gradient are means of those at the single scales."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture, as_config
from visor_jax.cost import decoder_flops, visual_flops
from visor_jax.data.from_config import make_tokenizer, sample_encoder, stage_parts, training_row_shape
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError
from visor_jax.loading import load
from visor_jax.train.objectives.answers import abstract_answers, answer_loss, stage_batches
from visor_jax.train.objectives.scales import batch_at_scale, fields_by_scale
from visor_jax.train.step_cost import StepCost
from visor_jax.workdir.metrics_log import read_rows

SCALES = {"model.reduction.method": "m3", "model.reduction.ratio": 0.25, "model.reduction.scales": (1.0, 0.25, 1 / 36)}
PACKED = {"data.pack_window": 4, "data.pool_rows": 2, "data.pool_tiles": 4, "data.visual_length": 24}


@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.slow), PACKED], ids=["a row each", "packed"])
def test_loss_and_gradient_are_means_over_the_scales(changes: dict[str, Any]) -> None:
    config = as_config(testing.tiny_config({**SCALES, **changes, "model.plan": "dense", "stages": ("dense",)}))
    arch = architecture(config, "dense")
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    with stage_batches(config, "dense", encode, SkipLog(), parts=stage_parts(config, "dense")) as batches:
        batch = next(batches)
    _, shapes = abstract_answers(config, "dense")
    assert {k: (x.shape, x.dtype) for k, x in batch.arrays.items()} == {
        k: (x.shape, x.dtype) for k, x in shapes.items()
    }

    params = testing.random_params(arch)
    loss = partial(answer_loss, num_turns=4, remat="none", tower_remat="none", budget=jnp.zeros(0, bool))

    def value(arch: Any, batch: Any) -> Any:
        return testing.quick_jit(jax.value_and_grad(partial(loss, arch=arch), has_aux=True))(params, batch)

    (mean, metrics), gradient = value(arch, batch.arrays)
    singles = [value(dataclasses.replace(arch, reduction=dataclasses.replace(arch.reduction, scales=())), batch.arrays)]
    singles += [value(other, batch_at_scale(batch.arrays, n)) for n, other in enumerate(arch.other_scales)]
    losses = [float(single) for (single, _), _ in singles]
    assert len({round(x, 6) for x in losses}) == 3
    assert float(mean) == pytest.approx(np.mean(losses), rel=1e-5)
    fields = fields_by_scale(arch, metrics)
    assert [*fields] == ["loss/ratio=0.25", "loss/ratio=1", "loss/ratio=0.0277778"]
    np.testing.assert_allclose([*fields.values()], losses, rtol=1e-5)
    expected = jax.tree.map(lambda *x: sum(x) / 3, *[gradients for _, gradients in singles])
    for found, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, leaf, atol=2e-5)

    content = batch.contents[0][0]
    assert content.scales == (37, 2) and content.visual == 10
    text = content.text
    decoder = [decoder_flops(arch, (), n, text, num_logits=text) for n in (10, 37, 2)]
    work = StepCost(arch, 3.0, 3.0).work([[content]], ())
    assert work.teraflops * 1e12 == pytest.approx(3 * (visual_flops(arch, content.tiles, 10) + sum(decoder)))


@pytest.mark.slow
def test_one_trained_model_answers_at_any_of_its_scales(tmp_path: Path, quick: None) -> None:
    config = testing.tiny_config({**SCALES, "stages": ("full",), "stage_overrides.full.init_from": ""}, steps=2)
    run_stages(config, str(tmp_path), ["full"])
    rows = read_rows(tmp_path / "full" / "metrics.jsonl")
    assert all(np.isfinite([row["loss/ratio=1"], row["loss/ratio=0.0277778"]]).all() for row in rows)
    model, picture = load(tmp_path), testing.random_picture(96, 96)
    for ratio, visual in ((1.0, 37), (0.25, 10), (1 / 36, 2)):
        at_ratio = model.at_ratio(ratio)
        size = at_ratio._prompt(picture, "Which color?").size
        assert size.visual == visual
        answer = at_ratio.answer(picture, "Which color?", budget="full", max_new_tokens=1)
        assert answer.decoder_flops == pytest.approx(decoder_flops(at_ratio.arch, (True, True), visual, size.text))
    with pytest.raises(RequestError, match=r"ratio=0\.5: expected one of model\.reduction\.scales"):
        model.at_ratio(0.5)
