"""A configuration like the default one but much smaller: every stage takes seconds on a CPU.

In so few steps the model learns little more than to give short answers. Use it to test behavior, not accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from visor_jax.config import default_config, validate

GRID, PATCH = 6, 16  # patches per side, and pixels per side of a patch: tiles of 96 pixels, a generated page


def tiny_config(changes: Mapping[str, Any] | None = None, *, steps: int = 4) -> ConfigDict:
    """Returns a checked, locked `ConfigDict`: six layers (two slots), pictures of 6 x 6 patches, batches of 4.

    Args:
      changes: {dotted field: value}, such as {"train.checkpoint_every": 1}.
      steps: number of steps of every trained stage.

    Raises:
      RequestError: the changed configuration is not valid.
    """
    config = default_config()
    config.name, config.tokenizer.path = "tiny", "almanac"
    config.model.text.update(
        hidden_size=32, intermediate_size=48, num_layers=6, num_heads=2, num_kv_heads=2, head_dim=16,
        rope_theta=30.0, tie_word_embeddings=True,
    )  # fmt: skip
    config.model.vision.update(
        tile_size=GRID * PATCH, patch_size=PATCH, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2
    )  # fmt: skip
    config.model.policy.update(hidden_size=16, max_budgets=8)
    config.data.update(
        source="almanac", turns_per_picture=2, batch_size=4, visual_length=GRID * GRID + 1, text_length=64
    )
    config.train.update(steps=steps, learning_rate=2e-2, schedule="constant", checkpoint_every=2, hang_seconds=600.0)
    config.stage_overrides.policy.update(learning_rate=1e-2)
    config.search.update(samples=24)  # one question per task
    config.label.update(samples=48)
    config.evaluate.update(samples=24, control_samples=8, batch_size=8, dials=(-4.0, 0.0, 4.0), timing_rounds=0)
    for name, value in (changes or {}).items():
        config.update_from_flattened_dict({name: value})
    return ConfigDict(validate(config).to_dict(), type_safe=False).lock()
