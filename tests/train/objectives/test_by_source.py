"""The loss of each source of a mixture: sums over the right tokens, and the loss itself stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.config import architecture
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.by_source import TEXT_SOURCES
from visor_jax.workdir.folder import Workdir

PACKED = {"data.pack_window": 8, "data.pool_rows": 2, "data.pool_tiles": 8, "data.text_length": 96}


def write_sources(root: Path) -> None:
    Image.new("RGB", (48, 48), "red").save(root / "a.png")
    for name, answer in (("short", "red"), ("long", "a red square that fills the picture")):
        talk = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": answer}]
        records = [{"id": f"{name}{i}", "image": "a.png", "conversations": talk} for i in range(8)]
        (root / f"{name}.json").write_text(json.dumps(records))


@pytest.mark.parametrize("packed", [False, True], ids=["one per row", "packed"])
def test_each_source_has_the_mean_loss_of_its_target_tokens(tmp_path: Path, packed: bool) -> None:
    write_sources(tmp_path)
    parts = (("llava", "short.json", "", 1.0), ("llava", "long.json", "", 1.0))
    changes: dict[str, Any] = {"data.root": str(tmp_path), "data.parts": parts}
    changes |= {"stages": ("full",), "data.test_fraction": 0.0, **(PACKED if packed else {})}
    config = tiny_config(changes)
    objective = make_objective(config, "full", Workdir(tmp_path / "run"))
    step = next(iter(objective.steps(0, 1)))
    params = testing.random_params(architecture(config))
    run = testing.quick_jit(objective.loss)
    loss, metrics = run(params, step.arrays, jnp.array(step.budget))
    sources = [sample.source for row in step.contents for sample in row]
    assert {*sources} == {"short", "long"} and len(sources) == int(metrics["samples"])

    row = objective.summarize(step, jax.device_get({**metrics, "loss": loss}))
    sums = np.asarray(metrics["source_sums"])
    np.testing.assert_allclose([row["loss/source=short"], row["loss/source=long"]], sums[:, 0] / sums[:, 1], rtol=1e-6)
    np.testing.assert_allclose(sums[:, 0].sum() / sums[:, 1].sum(), float(loss), rtol=1e-6)
    assert sums[:, 1].sum() == row["target_tokens"]
    targets = dict.fromkeys(("short", "long"), 0.0)
    for tokens, segments, held in zip(
        step.arrays["loss_mask"], step.arrays["text_segments"], step.contents, strict=True
    ):
        for number, sample in enumerate(held, start=1):
            targets[sample.source] += float((tokens & (segments == number)).sum())
    assert targets == {"short": sums[0, 1], "long": sums[1, 1]}

    alone = {name: array for name, array in step.arrays.items() if name != TEXT_SOURCES}
    unchanged, _ = run(params, alone, jnp.array(step.budget))
    assert float(unchanged) == pytest.approx(float(loss), rel=1e-6), "XLA may add the same losses up in another order"
