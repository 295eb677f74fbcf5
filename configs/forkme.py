r"""Your own pictures and questions: copy this file, change the marked lines, run it.

Reproduces: nothing; it fine-tunes a trained model on a JSON file of conversations, and repeats search, labels and
policy. This is a record; its picture's path is relative to `data.root`. docs/your_data.md lists the other supported
layouts and what is skipped:

    {"id": "1", "image": "scans/1.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich digit is this?"}, {"from": "gpt", "value": "seven"}]}

    visor data check --config=configs/forkme.py:runs/almanac_mini --config.data.root=DATA --config.data.path=train.json
        (exit status 1 if training would stop; --list=FILE writes what happens to every record)
    visor run --config=configs/forkme.py:runs/almanac_mini --workdir=runs/mine \
        --config.data.root=DATA --config.data.path=train.json

The argument after the colon is the workdir of the model to start from; docs/your_data.md has a complete example.
Expected: depends on your data; `visor evaluate --workdir=runs/mine` measures the accuracy on held-out records.
"""

import os

from ml_collections import ConfigDict

from visor_jax.config import default_config


def get_config(start: str = "runs/almanac_mini") -> ConfigDict:
    """Runs the stages from `full` on, with your data.

    Args:
      start: workdir of the run to start from.
    """
    config = default_config()
    config.name = "forkme"
    config.stages = ("full", "search", "universal", "label", "policy")
    config.stage_overrides.full.init_from = os.path.join(start, "universal")

    # The model must have the shape of the one it starts from: change these lines with `start`.
    config.model.text.update(
        vocab_size=0,  # as many as the tokenizer needs
        hidden_size=64,
        intermediate_size=192,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        rope_theta=100.0,
        tie_word_embeddings=True,
        max_positions=2048,  # training rows have 200
    )
    config.model.vision.update(
        tile_size=96,
        patch_size=12,
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
    )
    config.model.anyres.standardize = True
    config.tokenizer.path = "almanac"

    # Your data, the shape of a row, and how long to train.
    config.data.update(
        source="llava",
        root="data",
        path="train.json",
        batch_size=16,
        tiles=1,
        visual_length=72,  # 8 x 8 patches and the newline
        text_length=128,
    )
    config.train.update(
        learning_rate=5e-4, warmup_fraction=0.1, b2=0.98, weight_decay=0.01, clip_norm=1.0, checkpoint_every=300
    )
    config.stage_overrides.full.update(steps=200, learning_rate=1.5e-3, end_fraction=0.5)
    config.stage_overrides.universal.update(steps=200, learning_rate=1.5e-3)
    config.stage_overrides.policy.update(steps=300, batch_size=32, learning_rate=4e-3, label_balance=1.0)
    config.label.update(tolerance=0.2, only_right=True)

    # Numbers of questions from the validation, training and test splits.
    config.search.samples = 200
    config.label.samples = 1000
    config.evaluate.samples = 1000
    return config
