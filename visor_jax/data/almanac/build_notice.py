"""Builds NOTICE: `python -m visor_jax.data.almanac.build_notice PACKAGES [FILE]`.

In: tables.json, and PACKAGES, the folder that `build_tables` reads, with PyPI pdfboss-fonts 0.16.0 unpacked in its
folder pdfboss_fonts. Out: FILE (default: the one in the package): every source of tables, fonts and pictures with its
license and attribution, and the texts of the licenses that must be passed on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_HEAD = """\
NOTICE for the data set almanac

The files beside this one hold data, images of characters and small pictures of other people. They were selected,
scaled, rounded and rendered as docs/almanac.md describes; nobody named here endorses this.
"""
_FONTS = """\
atlas.npz: images of the printable ASCII characters of these fonts at 9 to 11 pixels

- Arimo, Copyright 2020 The Arimo Project Authors (https://github.com/googlefonts/arimo)
- Tinos, Copyright 2026 The Tinos Project Authors (https://github.com/googlefonts/tinos)
- Cousine, Copyright 2026 The Cousine Project Authors (https://github.com/googlefonts/cousine)
  License of the three: SIL Open Font License 1.1, below
- DejaVu Sans, DejaVu Serif (https://dejavu-fonts.github.io)
  License: that of the DejaVu fonts, below
"""
_PICTURES = """\
pictures.npz: small pictures

- ten emoji of Noto Color Emoji, Copyright 2013-2017 Google Inc. (https://github.com/googlefonts/noto-emoji)
  License: SIL Open Font License 1.1, below
- flags of Debian's iso-flags-png-320x240 (https://github.com/linuxmint/flags)
  License: public domain
"""


def sources(tables: list[dict]) -> str:
    """Returns the list of the tables' sources, each once."""
    lines = ["tables.json: parts of these sets", ""]
    named = {(t["source"]["package"], t["source"]["set"]): t["source"] for t in tables}
    for package, name in sorted(named):
        source = named[package, name]
        lines += [f"- {name}, in {package} ({source['url']})", f"  License: {source['license']}"]
        lines += [f"  Source: {source['attribution']}"]
    links = {
        "Creative Commons Attribution 4.0": "https://creativecommons.org/licenses/by/4.0/",
        "CC0": "https://creativecommons.org/publicdomain/zero/1.0/",
    }
    return "\n".join([*lines, "", *(f"{license}: {link}" for license, link in links.items())]) + "\n"


def build(packages: Path, tables: list[dict]) -> str:
    """Returns the text of NOTICE."""
    import matplotlib

    fonts = packages / "pdfboss_fonts" / "pdfboss_fonts" / "fonts"
    bokeh = next(packages.glob("bokeh_sampledata/*.dist-info/licenses/LICENSE.txt"))
    texts = {
        "MIT license of countryinfo": next(packages.glob("countryinfo/*.dist-info/licenses/LICENSE")),
        "MIT license of mendeleev": next(packages.glob("mendeleev/*.dist-info/licenses/LICENSE")),
        "BSD license of bokeh-sampledata": bokeh,
        "SIL Open Font License": fonts / "OFL.txt",
        "License of the DejaVu fonts": Path(matplotlib.get_data_path(), "fonts", "ttf", "LICENSE_DEJAVU"),
    }
    parts = [_HEAD, sources(tables), _FONTS, _PICTURES]
    parts += [f"{title}\n\n{file.read_text(encoding='utf-8').strip()}\n" for title, file in texts.items()]
    rule = "-" * 80 + "\n"
    lines = f"\n{rule}\n".join(parts).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    here = Path(__file__).parent
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else here / "NOTICE"
    listed = json.loads((here / "tables.json").read_text(encoding="utf-8"))
    target.write_text(build(Path(sys.argv[1]), listed), encoding="utf-8")
    print(f"{target}: {target.stat().st_size:,} bytes")
