"""The dense twin of `configs/glyphs_mini.py`: the baseline that VISOR is measured against, alone or with token packing.

Reproduces: what LLaVA-OneVision does, every visual token in every layer; and the usual saving, four neighbouring visual
tokens made one. `benchmarks/baselines.py` runs both beside VISOR.

    visor run --config=configs/glyphs_dense.py --workdir=runs/dense
    visor train --config=configs/glyphs_dense.py:runs/dense --config.stage=dense --workdir=runs/packed

The argument after the colon is a dense run whose `base` the packed twin starts from: a pretrained model knows single
patches. As many samples as glyphs_mini gives its stages warmup, full and universal together.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from visor_jax.config import config_from_file


def get_config(start: str = "") -> ConfigDict:
    """Base and dense stage; with `start`, the dense stage alone on visual tokens packed by four."""
    config = config_from_file(Path(__file__).with_name("glyphs_mini.py"))
    config.name = "glyphs_packed" if start else "glyphs_dense"
    config.model.plan = "dense"
    config.stages = ("dense",) if start else ("base", "dense")
    if start:
        config.model.anyres.packing = 4
        config.data.visual_length = 26  # 5 x 5 of 9 x 9 patches, and the newline
        config.stage_overrides.dense.init_from = os.path.join(start, "base")
    adaptive = config.stage_overrides
    steps = adaptive.warmup.steps + adaptive.full.steps + adaptive.universal.steps
    config.stage_overrides.dense.update(steps=steps, learning_rate=2e-3)
    return config
