"""The default job: trains an adaptive model from scratch on generated pictures, in minutes on two CPU cores.

Reproduces: the effect of *VISion On Request* (arXiv 2603.23495). Easy questions need no self-attention over visual
tokens, hard ones do, and the policy learns to tell them apart.

    visor run --config=configs/glyphs_mini.py --workdir=runs/glyphs_mini

Expected: 8.5 minutes on two otherwise idle CPU cores (README.md). `launch/quickstart.sh` installs everything and runs
this. Goals: ten minutes on two cores; accuracy of easy tasks at least 98 % at every budget, of hard tasks at most 65 %
with no slot on and at least 97 % with all three; `auto` within a point of all three at 60 % of their decoder FLOPs or
less. docs/glyphs_seeds.md has the results per seed.
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config


def get_config() -> ConfigDict:
    """Runs all stages on nine layers (three slots), with a tower whose patches do not see each other."""
    config = default_config()
    config.name = "glyphs_mini"

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

    config.train.update(b2=0.98, weight_decay=0.01, clip_norm=1.0, checkpoint_every=300)
    # One slot learns to follow one arrow; two slots learn to follow three.
    config.stage_overrides.base.update(
        steps=800,
        learning_rate=2e-3,
        b2=0.95,
        hops=(1, 3, 3),
        group_rates=(("vision/", 2.0),),  # relations can be learned only between glyphs that are recognized
    )
    # The new layers learn to read the features of tower and slots, which stay frozen until `full`. The text layers
    # train too, unlike those of a pretrained model, because this base has never described a picture.
    config.stage_overrides.warmup.update(
        steps=360,
        learning_rate=2.5e-3,
        schedule="constant",
        trainable=("(?!vision/|connector/|blocks/self/|routing/)",),
    )
    config.stage_overrides.full.update(steps=160, learning_rate=1.5e-3, end_fraction=0.5)
    config.stage_overrides.universal.update(steps=640, learning_rate=1.5e-3)
    # Small models are uncertain of correct answers, so a cheaper budget may lose a fifth of the full one's likelihood.
    # Few labels need two slots, because few questions show that they do; label_balance gives those labels more weight.
    config.label.update(samples=3072, tolerance=0.2, only_right=True)
    config.stage_overrides.policy.update(
        steps=600, batch_size=64, learning_rate=4e-3, label_balance=2.2, label_caution=1.25
    )
    return config
