r"""Your own pictures and questions: copy this file, change the marked lines, run it.

Reproduces: nothing; it fine-tunes a trained model on a JSON file of conversations and lets it learn anew what it may
spend. A record looks like this, its picture's path is relative to `data.root`; docs/your_data.md lists the other
layouts that are read, and what is skipped:

    {"id": "1", "image": "scans/1.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich digit is this?"}, {"from": "gpt", "value": "seven"}]}

    visor data check --config=configs/forkme.py:runs/glyphs_mini --config.data.root=DATA --config.data.path=train.json
        (exit status 1 where training would stop; --list=FILE says what becomes of every record)
    visor run --config=configs/forkme.py:runs/glyphs_mini --workdir=runs/mine \
        --config.data.root=DATA --config.data.path=train.json

The argument after the colon is the workdir of the model to start from. Expected: a few minutes on two CPU cores for a
few hundred small pictures. Then `visor evaluate --workdir=runs/mine` gives the accuracy on records held out.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from visor_jax.config import config_from_file


def get_config(start: str = "runs/glyphs_mini") -> ConfigDict:
    """The stages from `full` on, with your data.

    Args:
      start: workdir of the run to start from.
    """
    # The model has the shape of the one it starts from: change this line with `start`.
    config = config_from_file(Path(__file__).with_name("glyphs_mini.py"))
    config.name = "forkme"
    config.stages = ("full", "search", "universal", "label", "policy")
    config.stage_overrides.full.init_from = os.path.join(start, "universal")

    # Your data, its window, and how long to train.
    config.data.update(source="llava", root="data", path="train.json", batch_size=16, text_length=128)
    config.train.update(learning_rate=5e-4, warmup_fraction=0.1)
    config.stage_overrides.full.update(steps=200)
    config.stage_overrides.universal.update(steps=200)
    config.stage_overrides.policy.update(steps=300, batch_size=32)

    # How many questions of the validation, training and test part the later stages ask.
    config.search.samples = 200
    config.label.samples = 1000
    config.evaluate.samples = 1000
    return config
