"""Picture names: the file that each refers to, and refusal of names outside the data folder."""

import os
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.data.picture_paths import resolve_under
from visor_jax.data.sample import SkipSample


def build(top: Path) -> Path:
    """top/data with files and links, and files outside of it that no name may reach."""
    root = top / "data"
    (root / "sub" / unicodedata.normalize("NFD", "Übung")).mkdir(parents=True)
    for name in (
        "plain.png",
        "sub/plain.png",
        unicodedata.normalize("NFD", "sub/Übung/é.png"),
        "sub/ü ñ.png",
        "a\\b.png",
    ):
        (root / name).write_bytes(b"x")
    (top / "data2").mkdir()
    for name in ("secret.png", "data2/secret.png"):
        (top / name).write_bytes(b"x")
    (root / "inside").symlink_to("sub")
    (root / "coco").symlink_to("../data2")
    (root / "secret.png").symlink_to(top / "secret.png")
    (root / "loop").symlink_to("loop")
    (top / "alias").symlink_to("data")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return build(tmp_path)


@pytest.mark.parametrize(
    "name, file",
    [
        ("plain.png", "plain.png"),
        ("./sub//plain.png", "sub/plain.png"),
        ("sub/../plain.png", "plain.png"),
        ("gone/../plain.png", "plain.png"),
        ("inside/plain.png", "sub/plain.png"),
        ("inside/../plain.png", "plain.png"),  # by its spelling, wherever the link leads
        ("sub\\plain.png", "sub/plain.png"),
        (".\\sub\\..\\plain.png", "plain.png"),
        ("a\\b.png", "a\\b.png"),  # a backslash is an ordinary character of a name
        ("ROOT/plain.png", "plain.png"),
        ("ROOT/sub/../plain.png", "plain.png"),
        ("//ROOT/plain.png", "plain.png"),
        ("ALIAS/plain.png", "plain.png"),
        (unicodedata.normalize("NFC", "sub/Übung/é.png"), unicodedata.normalize("NFD", "sub/Übung/é.png")),
        (unicodedata.normalize("NFD", "sub/ü ñ.png"), "sub/ü ñ.png"),
        (unicodedata.normalize("NFC", "sub\\Übung\\é.png"), unicodedata.normalize("NFD", "sub/Übung/é.png")),
    ],
)
def test_names_as_people_have_them(root: Path, name: str, file: str) -> None:
    for opened in (root, root.parent / "alias"):
        requested = name.replace("ROOT", str(root)).replace("ALIAS", str(root.parent / "alias"))
        if "ALIAS" in name and opened == root:
            continue  # only spellings of the folder itself are recognized
        assert resolve_under(opened, requested) == (root / file).resolve()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../secret.png", "unsafe_path"),
        ("sub/../../secret.png", "unsafe_path"),
        ("..\\secret.png", "unsafe_path"),
        ("..", "unsafe_path"),
        ("../data/plain.png", "unsafe_path"),
        ("ROOT/../secret.png", "unsafe_path"),
        ("ROOT2/secret.png", "unsafe_path"),
        ("/etc/passwd", "unsafe_path"),
        ("\\etc\\passwd", "unsafe_path"),
        ("~/x.png", "unsafe_path"),
        ("file:///etc/passwd", "unsafe_path"),
        ("https://example.org/a.png", "unsafe_path"),
        ("data:image/png;base64,AAAA", "unsafe_path"),
        ("plain.png\0.jpg", "unsafe_path"),
        ("secret.png", "unsafe_path"),
        ("coco/secret.png", "unsafe_path"),
        ("C:\\pictures\\plain.png", "missing_file"),
        ("gone.png", "missing_file"),
        ("plain.png/x.png", "missing_file"),
        ("loop", "missing_file"),
        ("x" * 5000, "missing_file"),
        ("\ud800.png", "missing_file"),
    ],
)
def test_names_that_are_refused(root: Path, name: str, reason: str) -> None:
    with pytest.raises(SkipSample) as caught:
        resolve_under(root, name.replace("ROOT", str(root)))
    assert caught.value.reason == reason


def test_links_out_of_the_folder_are_followed_where_that_is_allowed(root: Path) -> None:
    with pytest.raises(SkipSample, match=r"through a link; data\.follow_links=True"):
        resolve_under(root, "coco/secret.png")
    assert resolve_under(root, "coco/secret.png", follow_links=True) == root.parent / "data2" / "secret.png"
    assert resolve_under(root, "secret.png", follow_links=True) == root.parent / "secret.png"
    for name in ("../secret.png", "coco/../../secret.png", "/etc/passwd"):
        with pytest.raises(SkipSample) as caught:
            resolve_under(root, name, follow_links=True)
        assert caught.value.reason == "unsafe_path"
    assert resolve_under(root, "coco/../plain.png", follow_links=True) == root / "plain.png"


PARTS = ["..", ".", "", "sub", "inside", "coco", "loop", "plain.png", "secret.png", "data", "data2", "alias", "~", "é"]


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=6), st.sampled_from("/\\"), st.booleans())
def test_no_name_leaves_the_folder(parts: list[str], separator: str, absolute: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = build(Path(folder).resolve())
        name = separator.join([str(root), *parts] if absolute else parts)
        try:
            path = resolve_under(root, name)
        except SkipSample as why:
            assert why.reason in ("unsafe_path", "missing_file")
        else:
            assert path.exists() and os.path.commonpath([root, path]) == str(root) == os.path.realpath(root)
