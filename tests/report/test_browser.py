"""The page in a real browser, if Chromium is installed: widths of a phone and a desk, light and dark, keyboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.conftest import benchmark_result, questions_result, user_benchmark
from visor_jax.files.read_write import write_json
from visor_jax.report.page import write_report
from visor_jax.workdir.folder import Workdir

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="neither chromium nor google-chrome is installed (Debian: apt-get install chromium)"
)
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
WIDTHS, HEIGHT = (360, 1200), 9000
# Measures the pages in the frames: the width of their content, and boxes that scroll but take no keyboard focus.
MEASURE = """
<pre id="measured"></pre>
<script>
window.onload = () => {
  const measured = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach((fold) => { fold.open = true; });
    const scrolls = [...page.querySelectorAll("div")].filter((box) => box.scrollWidth > box.clientWidth + 1);
    const skip = page.querySelector("a.skip"), hidden = skip.getBoundingClientRect().right;
    skip.focus();
    return {
      client: root.clientWidth, content: root.scrollWidth, boxes: scrolls.length,
      unreachable: scrolls.filter((box) => box.tabIndex !== 0).map((box) => box.className),
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      hidden: hidden, shown: skip.getBoundingClientRect().left,
    };
  });
  document.getElementById("measured").textContent = JSON.stringify(measured);
};
</script>
"""


@pytest.fixture
def frames(full_run: Path, tmp_path: Path) -> Path:
    """A page with the report in frames, because a window has a minimum width."""
    for metrics in full_run.glob("*/metrics.jsonl"):
        shutil.rmtree(metrics.parent)
    results = {"mme": benchmark_result, "receipts": user_benchmark, "mine": lambda folder, _: questions_result(folder)}
    for name, result in results.items():
        folder = full_run / "eval" / f"of_{name}"
        write_json(folder / "test.json", result(folder, name))
    (full_run / "eval" / "of_mme" / "validation.json").write_text("damaged")
    write_report(Workdir(full_run))
    shown = "".join(
        f"<iframe src='run/report/index.html' style='border:0;float:left;width:{width}px;height:{HEIGHT}px'></iframe>"
        for width in WIDTHS
    )
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><body style='margin:0'>{shown}{MEASURE}")
    return tmp_path / "frames.html"


def browse(page: Path, *options: str) -> str:
    """Opens a page in headless Chromium; returns what it prints."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars", *QUIET),
            *(
                f"--user-data-dir={page.parent / 'profile'}",
                f"--window-size={sum(WIDTHS)},{HEIGHT}",
                *options,
                page.as_uri(),
            ),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return done.stdout.decode()


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_its_width_and_follows_the_color_scheme(frames: Path, dark: bool) -> None:
    """On a phone nothing is wider than the page: wide tables scroll in boxes that the keyboard reaches."""
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    printed = browse(frames, "--allow-file-access-from-files", "--dump-dom", scheme)
    match = re.search('<pre id="measured">(.*?)</pre>', printed, re.DOTALL)
    assert match is not None
    measured: list[dict[str, Any]] = json.loads(unescape(match[1]))
    for width, page in zip(WIDTHS, measured, strict=True):
        assert page["client"] == width and page["content"] <= width, page
        assert page["unreachable"] == [] and page["hidden"] < 0 <= page["shown"], page
        assert page["paper"] == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert measured[0]["boxes"] > 0, "a table that scrolls on a phone"


def test_a_browser_draws_it(frames: Path) -> None:
    browse(frames, f"--screenshot={frames.parent / 'page.png'}")
    with Image.open(frames.parent / "page.png") as image:
        screen = np.asarray(image.convert("RGB")).astype(int)
    for pixels in (screen[:, : WIDTHS[0]], screen[:, WIDTHS[0] :]):
        for color in ("#2463b4", "#b4471b", "#0d4439"):  # easy and hard in text and curves; full in the routes
            wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).max(axis=-1) < 6).sum() > 50, color
