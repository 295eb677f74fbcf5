"""Builds pictures.npz: `python -m visor_jax.data.almanac.build_pictures PACKAGES COUNTRYINFO [FILE]`.

In: PACKAGES, a folder into which the Debian packages fonts-noto-color-emoji 2.042 (SIL Open Font License 1.1) and
iso-flags-png-320x240 1.0.2 (public domain) are unpacked (`apt-get download NAME`, `dpkg-deb -x FILE PACKAGES`), and
COUNTRYINFO, the folder `data` of PyPI countryinfo 1.0.1, which gives the codes of countries.
Out: FILE (default: the one in the package):

    emoji     uint8 [PICTURES, EMOJI_SIDE, EMOJI_SIDE, 4]         red, green, blue, coverage
    flags     uint8 [countries, FLAG_HEIGHT, FLAG_WIDTH, 4]       the same
    countries one per flag, as text
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visor_jax.data.almanac.build_tables import COUNTRIES
from visor_jax.data.almanac.pictures import EMOJI_SIDE, FLAG_HEIGHT, FLAG_WIDTH
from visor_jax.data.almanac.words import PICTURES

_NATIVE = 109  # the only size of the font's pictures
_CODES = {
    "Bell": 0x1F514, "Car": 0x1F697, "Cat": 0x1F431, "Dog": 0x1F436, "Fish": 0x1F41F, "Heart": 0x1F499, "Key": 0x1F511,
    "Moon": 0x1F319, "Star": 0x2B50, "Tree": 0x1F332,
}  # fmt: skip


def emoji(font: ImageFont.FreeTypeFont, word: str) -> np.ndarray:
    """Returns the picture of a word, uint8 [EMOJI_SIDE, EMOJI_SIDE, 4]."""
    canvas = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(canvas).text((0, 0), chr(_CODES[word]), font=font, embedded_color=True)
    box = canvas.getbbox()
    assert box is not None, f"the font has no picture of {word}"
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side))
    square.paste(canvas.crop(box), ((side - box[2] + box[0]) // 2, (side - box[3] + box[1]) // 2))
    return np.asarray(square.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS))


def flag(file: Path) -> np.ndarray:
    """Returns a flag without its shadow, uint8 [FLAG_HEIGHT, FLAG_WIDTH, 4]."""
    with Image.open(file) as picture:
        pixels = picture.convert("RGBA")
    solid = pixels.getchannel("A").point([255 if coverage > 250 else 0 for coverage in range(256)])
    return np.asarray(pixels.crop(solid.getbbox()).resize((FLAG_WIDTH, FLAG_HEIGHT), Image.Resampling.LANCZOS))


def build(packages: Path, countryinfo: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the file."""
    font = ImageFont.truetype(str(next(packages.rglob("NotoColorEmoji.ttf"))), _NATIVE)
    known = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(countryinfo.glob("*.json"))]
    codes = {country["name"]: country["ISO"]["alpha2"].lower() for country in known if "ISO" in country}
    flags = {name: next(packages.rglob("iso-flags-png-320x240")) / f"{codes[name]}.png" for name in COUNTRIES}
    return {
        "emoji": np.stack([emoji(font, word) for word in PICTURES]),
        "flags": np.stack([flag(file) for file in flags.values()]),
        "countries": np.array(list(flags)),
    }


if __name__ == "__main__":
    target = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).with_name("pictures.npz")
    np.savez_compressed(target, allow_pickle=False, **build(Path(sys.argv[1]), Path(sys.argv[2])))
    print(f"{target}: {target.stat().st_size:,} bytes")
