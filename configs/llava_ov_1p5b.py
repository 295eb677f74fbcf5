r"""LLaVA-OneVision 1.5B made adaptive: the recipe of `llava_ov_0p5b.py` with Qwen2-1.5B, nine self-attention slots.

Reproduces: the paper's 1.5B model, whose numbers are not known here (docs/paper.md); the same stages on a larger
decoder, where the share of the vision tower in the cost is smaller. Never run to the end by us: it needs accelerators.

    visor import --from=HF_DIR --workdir=DIR --config=configs/llava_ov_1p5b.py:HF_DIR/tokenizer.json
    visor run --config=configs/llava_ov_1p5b.py:HF_DIR/tokenizer.json --workdir=DIR \
        --config.data.root=DATA --config.data.path=train.json

`visor plan --config=configs/llava_ov_1p5b.py ...` prints the cost of a picture under each budget.
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config

WARMUP_SAMPLES, FULL_SAMPLES = 4_000_000, 3_200_000
BATCH = 32  # rows
SAMPLES = 186  # of a step: 5.8 share a row on average (`visor plan` counts them for LLaVA-OneVision's mixture)


def get_config(tokenizer: str = "tokenizer.json") -> ConfigDict:
    """Returns the 0.5B recipe with another decoder.

    Args:
      tokenizer: path of the checkpoint's tokenizer.json.
    """
    config = default_config()
    config.name = "llava_ov_1p5b"
    config.stages = ("warmup", "full", "search", "universal", "label", "policy")  # the imported model is `base`

    config.model.dtype = "bfloat16"
    config.model.text.update(
        vocab_size=152_000,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    config.model.vision.update(
        tile_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=26,
        num_heads=16,
    )
    config.model.anyres.update(pinpoints="(1x1),...,(6x6)", max_tiles=9)
    config.model.policy.hidden_size = 512
    config.tokenizer.path = tokenizer

    config.data.update(
        source="llava",
        root="data",
        path="train.json",
        batch_size=BATCH,
        tiles=37,  # 6 x 6 crops and the base
        visual_length=22_016,  # of a row; the largest sample has 8,832, and longer rows are fuller
        text_length=2048,
        pack_window=64,
        pool_rows=1,
        pool_tiles=37,  # about as many as the samples of a row have
    )

    config.train.update(
        learning_rate=1e-5,
        group_rates=(("vision/", 0.2),),
        weight_decay=0.0,
        b2=0.999,
        clip_norm=1.0,
        warmup_fraction=0.03,
        remat="attention",
        tower_remat="mlp",
        accumulate=2,
        checkpoint_every=500,
    )
    config.stage_overrides.warmup.update(steps=WARMUP_SAMPLES // SAMPLES, learning_rate=1e-3)
    config.stage_overrides.full.update(steps=FULL_SAMPLES // SAMPLES)
    config.stage_overrides.universal.update(steps=FULL_SAMPLES // SAMPLES)
    config.stage_overrides.policy.update(steps=4000, learning_rate=1e-3)

    config.label.samples = 100_000
    config.evaluate.batch_size = 16
    return config
