"""The fields of a configuration's sections `data`, `tokenizer` and `loss`. No JAX import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visor_jax.config.rules import PARTS, SAMPLING, at_least, not_empty, one_of, within
from visor_jax.config.values import setting

ASSETS = Path(__file__).parents[1] / "data" / "assets"
# Names of the built-in tokenizers; each belongs to the generated data set of the same name. The first is the default.
BUILT_IN = ("almanac",)

DEFAULT_MAX_PIXELS = 89_478_485  # per picture; above this size Pillow warns
PILLOW_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # above this size Pillow refuses to open a picture


@dataclass(frozen=True)
class DataConfig:
    """The source of questions, and the shape of one row of a batch."""

    source: str = setting(BUILT_IN[0], "a name from the table in visor_jax/data/sources", not_empty())
    root: str = setting("", "folder that holds the files and the pictures that records name")
    path: str = setting(
        "", "file below data.root, or a pattern (*, ?, [], {a,b}) of its shards; {split} stands for a split"
    )
    sampling: str = setting(
        "all", "records that are used, as in LLaVA's mixtures: all, first:N, end:N, random:10%", SAMPLING
    )
    mixture: str = setting("", "YAML file of several sources, instead of data.source and data.path")
    parts: tuple[tuple[str, str, str, float], ...] = setting(
        (),
        "several sources: (source or '', path, sampling, weight or 0) of each, as in data.mixture; of a generated one"
        " the path names an exercise",
        PARTS,
    )
    question_part: str = setting(
        "", "data.parts with generated ones: the path of the part that search, label and evaluate ask; empty: the first"
    )
    test_fraction: float = setting(
        0.1, "stored data: fraction of the records in each of validation and test", within(0, 0.45)
    )
    fonts: tuple[str, ...] = setting((), "source almanac: names of the fonts; empty: those of the exercise")
    kinds: tuple[str, ...] = setting((), "source almanac: kinds of pages; empty: all of the exercise")
    jitter: int = setting(1, "source almanac: largest distance of text below its line", within(0, 3), units="pixels")
    mixed_share: float = setting(0.3, "source almanac: share of pages with random words and numbers", within(0, 1))
    turns_per_picture: int = setting(4, "questions per conversation", at_least(1))
    independent_turns: bool = setting(
        False, "turns of a sample do not see each other: each is trained as if it alone were asked; pictures are shared"
    )
    batch_size: int = setting(32, "rows per optimizer step over all devices", at_least(1), units="rows")
    tiles: int = setting(1, "tiles per row of a batch; with packing, per sample", at_least(1), units="tiles")
    visual_length: int = setting(128, "visual tokens per row of a batch", at_least(1), units="visual tokens")
    text_length: int = setting(128, "text tokens per row of a batch", at_least(1), units="text tokens")
    small_pictures: bool = setting(
        False, "pictures to which the source gives a place in the tile keep their size and share tiles"
    )
    pack_window: int = setting(
        0, "samples per pool among which those that share a row are chosen; 0: one sample per row", at_least(0)
    )
    pool_rows: int = setting(1, "packing: rows that share a pool of tiles", at_least(1), units="rows")
    pool_tiles: int = setting(0, "packing: tiles per pool; at least data.tiles", at_least(0), units="tiles")
    workers: int = setting(
        0, "processes that prepare samples, for the batch or for each pool; 0: a thread", at_least(0), units="processes"
    )
    follow_links: bool = setting(False, "source llava: follow links below data.root that lead out of it")
    max_image_pixels: int = setting(
        DEFAULT_MAX_PIXELS,
        "largest picture in pixels; larger ones are skipped, not decoded",
        within(1, PILLOW_MAX_PIXELS),
    )
    reduced_jpeg: bool = setting(
        False, "decode JPEGs far larger than their tiles at a fraction of their size: faster, tiles differ slightly"
    )
    features: str = setting(
        "", "source tfds: 'image=image, question=question, answer=answer': features that hold a sample"
    )
    max_frames: int = setting(
        32, "used of one video, evenly spaced, as in LLaVA-OneVision", within(1, 10_000), units="frames"
    )
    max_skipped_fraction: float = setting(
        0.05, "training stops when a larger fraction of the samples is skipped", within(0, 1)
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and the system turn."""

    path: str = setting(BUILT_IN[0], "a built-in tokenizer's name, or the path of a tokenizer.json", not_empty())
    system: str = setting("", "text of the system turn; empty: none")


@dataclass(frozen=True)
class LossConfig:
    """Which tokens carry loss."""

    targets: str = setting(
        "answer", "the answer and its end token, or the tokens LLaVA's code trains on", one_of("answer", "llava")
    )
