"""The dense base of the default job: learns from random weights to read pages and to look things up on them.

Reproduces: the pretrained LLaVA-OneVision from which VISOR starts (arXiv 2603.23495), for a CPU: an ordinary vision
tower and decoder, next-token loss on answers, no other labels. Small pictures come first, then lists, then pages.
`configs/almanac_mini.py` starts from the result, which the package ships.

    visor run --config=configs/almanac_base.py --workdir=runs/almanac_base
    python -m visor_jax.export.ship --workdir=runs/almanac_base

After a colon, a base that learns more in a second round, without crops: the first round's result, or any other one,
such as "almanac-base", the shipped one. This one came from both rounds, over several days (recipe.json has the
configuration and commit of each stage; the lists of its second round had slightly other weights):

    visor run --config=configs/almanac_base.py:runs/almanac_base/base_pages --workdir=runs/almanac_again
    python -m visor_jax.export.ship --workdir=runs/almanac_again

Expected: 0.7 million parameters; two hours on one CPU core and one more for the second round. An interrupted run
continues with the same command, also on another day: each stage keeps its weights, and the next one starts from them.
"""

from ml_collections import ConfigDict

from visor_jax.config import default_config

# Weights of the exercises in each phase. Rows are weighed, not pictures: a row is a sheet of about nine crops, of three
# lists, of two small tables or bars, or one page.
WORDS = (("crops", 1.0),)
LINES = (("crops", 1.0), ("crops_tall", 0.4), ("crops_line", 1.0), ("bars_small", 0.1))
TWO_LINES = (("crops", 0.4), ("crops_line", 1.0), ("crops_two_lines", 1.0), ("bars_small", 0.15))
# Colors, words in every role and short look-ups stay in every phase: what a phase leaves out is forgotten.
KEPT = (("crops_line", 0.1), ("bars_small", 0.2), ("tables_one_row", 0.1), ("vbars_small", 0.1))
READ = (("lists", 1.0), ("crops_line", 0.3), ("bars_small", 0.2), ("tables_one_row", 0.1))
# A task that stays at chance in a mixture starts to be learned when it is asked mostly.
SHORT = (("lists_short", 1.0), ("lists", 0.2), *KEPT)
WHO = (("lists_who", 1.0), ("lists_short", 0.3), ("lists", 0.2), *KEPT)
COMPARE = (("lists_compare", 1.0), ("lists_one_digit", 0.2), ("lists_short", 0.3), *KEPT)
LISTS = (("lists", 1.0), ("lists_one_digit", 0.1), ("lists_who", 0.1), ("tables_small", 0.15), *KEPT)
# Look-ups in lists rise further at a full rate; those of tables and of all bars begin when they are asked mostly.
ONE_ROW = (("tables_one_row", 1.0), ("lists", 0.5), ("bars_small", 0.1), ("vbars_small", 0.1))
LISTS_AGAIN = (
    ("lists", 1.0), ("lists_who", 0.2), ("lists_compare", 0.2), ("tables_one_row", 0.4), ("tables_small", 0.3),
    ("vbars_small", 0.3), ("bars_small", 0.2), ("crops_line", 0.1),
)  # fmt: skip
UPRIGHT = (
    ("vbars_small", 1.0), ("tables_small", 0.5), ("tables_one_row", 0.3), ("lists", 0.3), ("bars_small", 0.15),
    ("crops_line", 0.05),
)  # fmt: skip
COLUMNS = (
    ("tables_small", 1.0), ("tables_one_row", 0.3), ("vbars_small", 0.4), ("pages_72", 0.4), ("pages", 0.4),
    ("lists", 0.2), ("bars_small", 0.15), ("crops_line", 0.05),
)  # fmt: skip
PAGES = (
    ("pages", 3.0), ("pages_72", 0.25), ("tables_one_row", 0.15), ("tables_small", 0.25), ("vbars_small", 0.2),
    ("lists", 0.15), ("bars_small", 0.1),
)  # fmt: skip
# What a second round begins with: to find the line of a word, or the column of a head, is learned from few words; with
# all words at once it stays at half for long.
FEW_WORDS = (("lists_few_words", 1.0), ("lists", 0.2), ("bars_small", 0.1))
FROM_WORD = (("lists_from_word", 1.0), ("lists", 0.2), ("bars_small", 0.1))
FEW_COLUMNS = (("tables_few_words", 1.0), ("vbars_few_words", 0.4), ("lists", 0.3), ("bars_small", 0.1))


def get_config(start: str = "") -> ConfigDict:
    """Runs the stages base_words, base_lists and base_pages, or a second round of the last two from `start`."""
    config = default_config()
    config.name = "almanac_base"
    config.stages = ("base_words", "base_lists", "base_pages")

    config.model.plan = "dense"
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
        embedding_init=0.125,
        residual_init=0.29,  # 1 / sqrt(2 * 6)
        max_positions=2048,  # training rows have 200
    )
    config.model.vision.update(
        tile_size=96,
        patch_size=12,
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        position_init="sines",
        residual_init=0.41,  # 1 / sqrt(2 * 3)
    )
    config.model.anyres.standardize = True
    config.tokenizer.path = "almanac"

    phases = (WORDS, LINES, TWO_LINES, READ, SHORT, WHO, COMPARE, LISTS, FEW_WORDS, FROM_WORD, FEW_COLUMNS, PAGES)
    exercises = dict.fromkeys(name for weights in phases for name, _ in weights)
    config.data.update(
        source="almanac",
        parts=tuple(("almanac", name, "all", 1.0) for name in exercises),
        question_part="pages",
        turns_per_picture=16,
        batch_size=12,
        tiles=1,
        visual_length=72,  # a page has 64 patches and a newline
        text_length=128,
        independent_turns=True,
        small_pictures=True,
    )

    config.train.update(
        objective="answer",
        learning_rate=1.5e-3,
        end_fraction=0.05,
        b2=0.95,
        weight_decay=0.03,
        clip_norm=1.0,
        group_rates=(("vision/patch_embedding", 0.3),),
        checkpoint_every=200,
        validate_every=500,
        validate_samples=256,
    )
    config.stage_overrides.base_words.update(
        batch_size=8, accumulate=2, steps=3600, curriculum=((0, WORDS), (1000, LINES), (2000, TWO_LINES))
    )
    config.stage_overrides.base_lists.update(
        batch_size=12,
        accumulate=3,
        steps=10_000,
        curriculum=((0, READ), (1000, SHORT), (4000, WHO), (4800, COMPARE), (6500, LISTS)),
    )
    config.stage_overrides.base_pages.update(
        batch_size=12,
        accumulate=3,
        steps=11_600,
        curriculum=((0, ONE_ROW), (700, LISTS_AGAIN), (2200, UPRIGHT), (3400, COLUMNS), (4600, PAGES)),
    )
    if start:
        config.stages = ("base_lists", "base_pages")
        config.train.update(learning_rate=1e-3, b2=0.99)
        config.stage_overrides.base_lists.update(
            init_from=start, steps=7000, curriculum=((0, FEW_WORDS), (2000, FROM_WORD), (4500, LISTS))
        )
        config.stage_overrides.base_pages.update(
            steps=7500, curriculum=((0, FEW_COLUMNS), (1000, COLUMNS), (2000, PAGES))
        )
    config.evaluate.update(samples=2048, batch_size=32)
    return config
