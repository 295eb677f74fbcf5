"""A larger model on larger pages: 480 pixels, cut into tiles, 28 million parameters. Planned, never trained.

Reproduces: nothing yet. The recipe is that of `configs/almanac_base.py`, then that of `configs/almanac_mini.py` with
four slots, for one GPU. Its cost was only planned, and a test trains one small step of it:

    visor plan --config=configs/almanac_large.py --topology=h200x1 --by-formula
    visor run --config=configs/almanac_large.py --workdir=runs/almanac_large

Expected: unknown. Planned for one H200: 0.10 s per step of 64 pages in the dense stages, six minutes for `base_pages`.
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config

# Weights of rows, as in configs/almanac_base.py: a row of crops holds dozens of them.
WORDS = (("crops", 2.0), ("crops_tall", 1.0), ("bars_small", 0.3))
KEPT = (("crops", 0.1), ("bars_small", 0.2), ("tables_one_row", 0.1), ("vbars_small", 0.1))
LOOK_UP = (("lists_who", 1.0), ("lists_compare", 0.7), ("lists_short", 0.5), *KEPT)
LISTS = (("lists", 1.0), ("tables_small", 0.2), *KEPT)
COLUMNS = (("tables_small", 0.5), ("vbars_small", 0.5), ("pages", 1.0), ("pages_480", 0.5), ("bars_small", 0.2))
PAGES = (("pages_480", 3.0), ("pages", 0.5), ("tables_small", 0.2), ("vbars_small", 0.2), ("lists", 0.2))


def get_config() -> ConfigDict:
    """Runs all stages, from the dense base to the policy, on twelve layers (four slots)."""
    config = default_config()
    config.name = "almanac_large"
    config.stages = (
        "base_words", "base_lists", "base_pages", "warmup", "full", "search", "universal", "label", "policy",
    )  # fmt: skip

    config.model.dtype = "bfloat16"
    config.model.text.update(
        vocab_size=0,  # as many as the tokenizer needs
        hidden_size=384,
        intermediate_size=1152,
        num_layers=12,
        num_heads=8,
        num_kv_heads=4,
        head_dim=48,
        rope_theta=1000.0,
        tie_word_embeddings=True,
        embedding_init=0.05,
        residual_init=0.2,
        max_positions=8192,
    )
    config.model.vision.update(
        tile_size=240,
        patch_size=12,
        hidden_size=256,
        intermediate_size=768,
        num_layers=6,
        num_heads=4,
        position_init="sines",
        residual_init=0.3,
    )
    config.model.anyres.update(pinpoints="(2x2)", max_tiles=4, standardize=True)
    config.tokenizer.path = "almanac"

    phases = (WORDS, LOOK_UP, LISTS, COLUMNS, PAGES)
    exercises = dict.fromkeys(name for weights in phases for name, _ in weights)
    config.data.update(
        source="almanac",
        parts=tuple(("almanac", name, "all", 1.0) for name in exercises),
        question_part="pages_480",
        turns_per_picture=32,
        batch_size=64,
        tiles=5,  # the whole page, and its four quarters
        visual_length=2048,  # 5 x 400 patches and 41 newlines
        text_length=512,
        independent_turns=True,
        small_pictures=True,
        workers=12,
    )

    config.train.update(
        learning_rate=6e-4,
        end_fraction=0.05,
        b2=0.95,
        weight_decay=0.03,
        clip_norm=1.0,
        group_rates=(("vision/patch_embedding", 0.3),),
        checkpoint_every=500,
    )
    config.stage_overrides.base_words.update(steps=600, curriculum=((0, WORDS),))
    config.stage_overrides.base_lists.update(steps=1500, curriculum=((0, LISTS), (400, LOOK_UP), (900, LISTS)))
    config.stage_overrides.base_pages.update(steps=3500, curriculum=((0, COLUMNS), (900, PAGES)))
    pages = ((0, PAGES),)
    config.stage_overrides.warmup.update(steps=250, init_from="base_pages", learning_rate=1e-3, curriculum=pages)
    config.stage_overrides.full.update(steps=500, learning_rate=3e-4, curriculum=pages)
    config.stage_overrides.universal.update(steps=1000, learning_rate=3e-4, curriculum=pages)

    config.search.samples = 1024
    config.label.update(samples=8192, tolerance=0.1, only_right=True)
    config.stage_overrides.policy.update(steps=1000, batch_size=64, learning_rate=1e-3)
    config.evaluate.update(samples=2048, batch_size=32)
    return config
