"""Builds atlas.npz: `python -m visor_jax.data.almanac.build_atlas FONTS [FILE]`.

In: FONTS, the folder with the fonts of PyPI pdfboss-fonts 0.16.0 (SIL Open Font License 1.1; `pip download --no-deps
--python-version 3.12 --only-binary=:all: pdfboss-fonts` and unpack), and the DejaVu fonts that matplotlib installs.
Out: FILE (default: the one in the package): the masks of all printable ASCII characters in `FACES` at sizes 9 to 11.

    masks     uint8 [faces, sizes, characters, HEIGHT, WIDTH]  coverage; the baseline of size s is below row s - 2
    advances  uint8 [faces, sizes, characters]                 width in pixels by which the next character is moved
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visor_jax.data.almanac.fonts import CHARACTERS, FACES, HEIGHT, LEFT, SIZES, WIDTH

FILES = {
    "DejaVu Sans": "DejaVuSans.ttf",
    "DejaVu Serif": "DejaVuSerif.ttf",
    "Arimo": "Arimo[wght].ttf",
    "Tinos": "Tinos-Regular.ttf",
    "Cousine": "Cousine-Regular.ttf",
    "Arimo Bold": "Arimo-Bold.ttf",
}


def glyph(font: ImageFont.FreeTypeFont, character: str, size: int) -> np.ndarray:
    """Returns the mask of one character, uint8 [HEIGHT, WIDTH]; raises ValueError if it does not fit."""
    canvas = Image.new("L", (3 * WIDTH, 3 * HEIGHT))
    ImageDraw.Draw(canvas).text((WIDTH + LEFT, HEIGHT + size - 1), character, fill=255, font=font, anchor="ls")
    pixels = np.asarray(canvas)
    mask = pixels[HEIGHT : 2 * HEIGHT, WIDTH : 2 * WIDTH]
    if int(mask.sum()) < int(pixels.sum()):
        raise ValueError(f"{character!r} of {font.getname()} at size {size} does not fit into {WIDTH} x {HEIGHT}")
    return mask


def build(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the atlas."""
    import matplotlib

    folders = (folder, Path(matplotlib.get_data_path(), "fonts", "ttf"))
    masks = np.zeros((len(FACES), len(SIZES), len(CHARACTERS), HEIGHT, WIDTH), np.uint8)
    advances = np.zeros(masks.shape[:3], np.uint8)
    for face, name in enumerate(FACES):
        file = next(place / FILES[name] for place in folders if (place / FILES[name]).exists())
        for row, size in enumerate(SIZES):
            font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
            for column, character in enumerate(CHARACTERS):
                masks[face, row, column] = glyph(font, character, size)
                advances[face, row, column] = round(font.getlength(character))
    return {"masks": masks, "advances": advances}


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("atlas.npz")
    np.savez_compressed(target, allow_pickle=False, **build(Path(sys.argv[1])))
    print(f"{target}: {target.stat().st_size:,} bytes")
