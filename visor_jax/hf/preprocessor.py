"""Reads and writes a checkpoint's image processor configuration; unsupported values are rejected by field name.

In: `preprocessor_config.json`, or the image processor inside `processor_config.json`, as transformers 5 saves them.
Out: mean and standard deviation of the pixels, or that each picture is standardized. This package supports one value
for every other field (bicubic resizing into tiles of the tower's size, values in [0, 1], normalized); any other value
is a `RequestError`. A missing or null field has transformers' default; size and grids then follow `config.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.errors import RequestError
from visor_jax.hf.section import Section, read_object

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]  # default of LlavaOnevisionImageProcessor
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3  # PIL.Image.Resampling
STANDARDIZING = "VisorImageProcessor"  # no class of transformers, so that none reads the pixels in another way
PROCESSORS = ("LlavaOnevisionImageProcessor", "LlavaOnevisionImageProcessorFast", "LlavaOnevisionImageProcessorPil")


def read_preprocessor(folder: Path) -> Section:
    """Reads the image processor's fields; processor_config.json takes precedence, as in transformers.

    Raises:
      RequestError: both files are missing, or one cannot be read.
    """
    separate, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    if joint.exists():
        root = Section(read_object(joint), f"{joint}: ")
        if root.values.get("image_processor") is not None:
            return root.section("image_processor")
    if not separate.exists():
        detail = " (processor_config.json is there, and has no image_processor)" if joint.exists() else ""
        raise RequestError(f"{separate}: no such file{detail}; expected it, or processor_config.json of transformers 5")
    return Section(read_object(separate), f"{separate}: ")


def check_processor(folder: Path, config: Section, patches_per_tile: int) -> None:
    """Checks that processor_config.json, if it exists, agrees with `config.json` on the number of visual tokens.

    Raises:
      RequestError: a field differs.
    """
    file = folder / "processor_config.json"
    if not file.exists():
        return
    processor = Section(read_object(file), f"{file}: ")
    expected = {
        "vision_aspect_ratio": (config.get("vision_aspect_ratio", "anyres_max_9"), "as in config.json"),
        "vision_feature_select_strategy": ("full", "all that this model computes"),
        "num_image_tokens": (patches_per_tile, "the patches of one tile of config.json"),
        "image_token": (IMAGE_MARKER, "the token that this package replaces by a picture"),
    }
    for name, (supported, why) in expected.items():
        if processor.values.get(name) not in (None, supported):
            raise processor.wrong(name, f"{supported!r}, {why}")


def pixel_statistics(
    pixels: Section, tile: int, pinpoints: tuple[tuple[int, int], ...]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Checks the image processor's fields and returns mean and standard deviation per RGB channel.

    Args:
      pixels: the image processor's fields.
      tile: side of a tile in pixels, from config.json.
      pinpoints: (height, width) in pixels, from config.json.

    Raises:
      RequestError: a field has a value that this package does not support.
    """
    kind, standardized = pixels.values.get("image_processor_type"), is_standardized(pixels)
    if kind is not None and kind not in ((STANDARDIZING,) if standardized else PROCESSORS):
        expected = STANDARDIZING if standardized else PROCESSORS[0]
        raise pixels.wrong("image_processor_type", f"{expected!r}, whose tiles are all that this package cuts")
    for name in ("do_resize", "do_convert_rgb", *(() if standardized else ("do_rescale", "do_normalize"))):
        if not pixels.boolean(name, True):
            raise pixels.wrong(name, "true, all that this package computes")
    if pixels.boolean("do_center_crop", False):
        raise pixels.wrong("do_center_crop", "false, all that this package computes")
    pixels.boolean("do_pad", True)  # pads batches only; both values give the same pixels
    factor = pixels.positive("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise pixels.wrong("rescale_factor", f"1/255 ({1 / 255})")
    if pixels.get("resample", BICUBIC) != BICUBIC:
        raise pixels.wrong("resample", f"{BICUBIC}, bicubic, all that this package computes")
    for name in ("size", "crop_size"):
        if pixels.values.get(name) is not None and not _is_square(pixels.values[name], tile):
            raise pixels.wrong(
                name, f'{{"height": {tile}, "width": {tile}}}, as vision_config.image_size in config.json'
            )
    grids = pixels.values.get("image_grid_pinpoints")
    if grids is not None and grids != [list(pair) for pair in pinpoints]:
        raise pixels.wrong("image_grid_pinpoints", "the same pairs in the same order as in config.json, or none")
    mean = pixels.channels("image_mean", CLIP_MEAN, minimum=0, maximum=1)  # also the padding color
    return mean, pixels.channels("image_std", CLIP_STD, minimum=1e-4, maximum=1e4)


def is_standardized(pixels: Section) -> bool:
    """Returns whether each picture is standardized by its own mean and deviation (`model.anyres.standardize`)."""
    return pixels.boolean("standardize", False)


def _is_square(size: Any, side: int) -> bool:
    """Returns whether transformers interprets `size` as side x side pixels."""
    if isinstance(size, Mapping):
        present = {name: value for name, value in size.items() if value is not None}
        return present in ({"height": side, "width": side}, {"shortest_edge": side})
    return size == side or size == [side, side]


def write_preprocessor(arch: Architecture) -> dict[str, Any]:
    """Returns the fields for transformers' LlavaOnevisionImageProcessor (also the PIL one) and for VisorProcessor.

    No image processor of transformers standardizes pictures: those fields are for VisorProcessor alone.
    """
    standardize = arch.anyres.standardize
    return {
        **({"standardize": True} if standardize else {}),
        "image_processor_type": STANDARDIZING if standardize else "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": not standardize,
        "do_pad": True,
        "do_rescale": not standardize,
        "do_resize": True,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in arch.anyres.pinpoints],
        "image_mean": list(arch.anyres.image_mean),
        "image_std": list(arch.anyres.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": arch.vision.tile_size, "width": arch.vision.tile_size},
    }
