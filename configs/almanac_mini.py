"""The default job: makes a small dense model, which reads pages, adaptive on a CPU.

Reproduces: *VISion On Request* (arXiv 2603.23495) on pages with tables, bars and labels: easy questions need no
self-attention over visual tokens, look-ups do, and the policy learns to tell them apart. It does what a user of
LLaVA-OneVision does (`configs/llava_ov_finetune.py`), from the dense base that the package ships.

    visor run --config=configs/almanac_mini.py --workdir=runs/almanac_mini

After a colon, another checkpoint: `--config=configs/almanac_mini.py:HF_DIR`. `configs/almanac_base.py` trains the base.

Expected: about ten minutes on two CPU cores; easy 99 % under every budget; hard 23 % without slots, 38 % with one, 41 %
with two; the base has 60 % (seed 1, 4,096 test questions: `benchmarks/claims.py`).
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config


def get_config(base: str = "almanac-base") -> ConfigDict:
    """Runs all stages after the base on six layers (two slots)."""
    config = default_config()
    config.name = "almanac_mini"
    config.stages = ("warmup", "full", "search", "universal", "label", "policy")

    # --- the base's sizes (configs/almanac_base.py) -------------------------------------------------------------------
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

    # --- data ---------------------------------------------------------------------------------------------------------
    config.data.update(
        source="almanac",
        path="pages",
        turns_per_picture=8,
        batch_size=16,
        tiles=1,
        visual_length=72,  # a page has 64 patches and a newline
        text_length=128,
        independent_turns=True,
    )

    # --- training -----------------------------------------------------------------------------------------------------
    config.train.update(b2=0.98, weight_decay=0.01, clip_norm=1.0, end_fraction=0.05, checkpoint_every=300)
    # Only the new layers train; all others are the base's.
    config.stage_overrides.warmup.update(steps=250, learning_rate=2e-3, init_from=base)
    config.stage_overrides.full.update(steps=350, learning_rate=1e-3)
    config.stage_overrides.universal.update(steps=750, learning_rate=1e-3)

    # --- search, labels, policy, evaluation ---------------------------------------------------------------------------
    # Small models are uncertain of correct answers, so a cheaper budget may lose a fifth of the full one's likelihood.
    config.search.samples = 512
    config.label.update(samples=2048, tolerance=0.2, only_right=True)
    config.stage_overrides.policy.update(steps=400, batch_size=64, learning_rate=4e-3, label_balance=1.0)
    config.evaluate.update(samples=1024, batch_size=64, dense_start=True)
    return config
