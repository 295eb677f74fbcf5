"""The default job: an adaptive model from nothing, on pictures generated on the fly, in minutes on two CPU cores.

Reproduces: the effect of *VISion On Request* (arXiv 2603.23495). Easy questions need no self-attention over visual
tokens, hard ones do, and the policy learns which is which.

    visor run --config=configs/glyphs_mini.py --workdir=runs/glyphs_mini

Expected: 8.5 minutes on two otherwise idle CPU cores (README.md). `launch/quickstart.sh` installs everything and runs
this. Goals: ten minutes on two cores; easy tasks at least 98 % right at every budget, hard ones at most 65 % with no
slot on and at least 97 % with all three, `auto` within a point of all three at 60 % of their decoder FLOPs or less.
docs/glyphs_seeds.md has what five seeds reached.
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config


def get_config() -> ConfigDict:
    """Nine layers (three slots), a tower in which no patch sees another, six trained stages."""
    config = default_config()
    config.name = "glyphs_mini"

    config.model.text.update(
        vocab_size=0,  # as many as the tokenizer has
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
        max_positions=2048,  # rows of training have 166
    )
    config.model.vision.update(
        tile_size=72,
        patch_size=8,
        hidden_size=96,
        intermediate_size=512,  # with 192 it tells 96 % of the glyphs, with 512 it tells 99 %
        num_layers=1,
        num_heads=4,
        patch_local=True,  # a tower that mixes patches would do the decoder's work
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

    config.train.update(b2=0.98, weight_decay=0.01, clip_norm=1.0, checkpoint_every=300)
    # One slot learns to follow one arrow, two learn to compose: three arrows.
    config.stage_overrides.base.update(
        steps=800,
        learning_rate=2e-3,
        b2=0.95,
        hops=(1, 3, 3),
        group_rates=(("vision/", 2.0),),  # relations can be learned only of glyphs that are told apart
    )
    # The new layers learn to read what `base` taught the tower and the slots; those stay as they are until `full`. The
    # text layers train along, as no pretrained model's would: this base has never spoken of a picture.
    config.stage_overrides.warmup.update(
        steps=360,
        learning_rate=2.5e-3,
        schedule="constant",
        trainable=("(?!vision/|connector/|blocks/self/|routing/)",),
    )
    config.stage_overrides.full.update(steps=160, learning_rate=1.5e-3, end_fraction=0.5)
    config.stage_overrides.universal.update(steps=640, learning_rate=1.5e-3)
    # Small models are unsure of answers that they know, so a cheaper budget may be a fifth less sure than the full one.
    # Few labels ask for two slots, as few questions tell that they need them: those labels weigh more.
    config.label.update(samples=3072, tolerance=0.2, only_right=True)
    config.stage_overrides.policy.update(
        steps=600, batch_size=64, learning_rate=4e-3, label_balance=2.2, label_caution=1.25
    )
    return config
