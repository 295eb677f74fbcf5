"""The dense baseline of `configs/glyphs_mini.py`, with or without token packing.

Reproduces: LLaVA-OneVision, with every visual token in every layer; and a common way to save FLOPs, packing four
neighboring visual tokens into one. `benchmarks/baselines.py` compares both with VISOR.

    visor run --config=configs/glyphs_dense.py --workdir=runs/dense
    visor train --config=configs/glyphs_dense.py:runs/dense --config.stage=dense --workdir=runs/packed

The argument after the colon is a dense run; the packed model starts from its `base`, which was pretrained on single
patches. Training uses as many samples as the stages warmup, full and universal of glyphs_mini together.

Expected: docs/baselines.md has the accuracies and costs of one run of both; the time was not measured.
"""

import os

from ml_collections import ConfigDict

from visor_jax.config import default_config


def get_config(start: str = "") -> ConfigDict:
    """Runs the stages base and dense; with `start`, only dense, on visual tokens packed by four."""
    config = default_config()
    config.name = "glyphs_packed" if start else "glyphs_dense"
    config.stages = ("dense",) if start else ("base", "dense")

    config.model.plan = "dense"
    config.model.text.update(
        vocab_size=0,  # as many as the tokenizer needs
        hidden_size=64,
        intermediate_size=192,
        num_layers=9,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        rope_theta=30.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        embedding_init=0.7,
        residual_init=0.5,
        norm_init=0.25,
        recency_init=8.0,
        max_positions=2048,  # training rows have 166
    )
    config.model.vision.update(
        tile_size=72,
        patch_size=8,
        hidden_size=96,
        intermediate_size=512,  # recognizes 99 % of the glyphs; 192 recognizes 96 %
        num_layers=1,
        num_heads=4,
        patch_local=True,  # a tower that mixes patches could solve tasks meant for the decoder
    )
    config.model.cross.init = "match"
    config.tokenizer.path = "glyphs"

    config.data.update(
        source="glyphs",
        scenes=(("letters", 3), ("scatter", 6), ("cards", 3), ("above", 4), ("tall", 3), ("chain", 5)),
        turns_per_picture=4,
        batch_size=12,
        tiles=1,
        visual_length=82,  # 9 x 9 patches and the newline
        text_length=84,
    )

    if start:
        config.model.anyres.packing = 4
        config.data.visual_length = 26  # 5 x 5 of 9 x 9 patches, and the newline
        config.stage_overrides.dense.init_from = os.path.join(start, "base")

    config.train.update(b2=0.98, weight_decay=0.01, clip_norm=1.0, checkpoint_every=300)
    # One slot learns to follow one arrow; two slots learn to follow three.
    config.stage_overrides.base.update(
        steps=800,
        learning_rate=2e-3,
        b2=0.95,
        hops=(1, 3, 3),
        group_rates=(("vision/", 2.0),),  # relations can be learned only between glyphs that are recognized
    )
    # 360, 160 and 640: the steps of glyphs_mini's stages warmup, full and universal.
    config.stage_overrides.dense.update(steps=1160, learning_rate=2e-3)

    return config
