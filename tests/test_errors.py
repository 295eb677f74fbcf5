"""Errors of failed writes, suggestions for misspelled names, and printable text."""

import errno
import os

import pytest

from visor_jax.errors import RequestError, RunError, nearest, one_line, printable, unwritable


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, RequestError),
        (errno.ENOTDIR, RequestError),
        (errno.ENOENT, RequestError),
        (errno.EROFS, RequestError),
        (errno.ENOSPC, RunError),
        (errno.EIO, RunError),
    ],
)
def test_a_place_that_could_never_be_written_is_a_wrong_request(number, kind):
    printed = unwritable("--out=x", OSError(number, os.strerror(number)))
    assert type(printed) is kind
    assert str(printed) == f"--out=x: cannot be written: {os.strerror(number)}"


def test_near_names_are_told_best_first():
    assert nearest("Evaluat", ["generate", "evaluate"]) == "did you mean 'evaluate'?"
    assert nearest("xyzzy", ["generate", "evaluate"]) == ""


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("task \x1b[31mred", r"task \x1b[31mred"),
        ("a\nvisor: b", r"a\nvisor: b"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("\u202eesrever\u2066", r"\u202eesrever\u2066"),
        ("nul \0 del \x7f c1 \x9b", r"nul \x00 del \x7f c1 \x9b"),
        ("grün 漢字 עברית नमस्ते 🙂", "grün 漢字 עברית नमस्ते 🙂"),
    ],
)
def test_what_comes_with_data_cannot_steer_a_terminal(text, printed):
    assert printable(text) == printed
    assert printable(text).encode("utf-8")
    assert one_line(f" {text} \n") == printable(" ".join(text.split()))
