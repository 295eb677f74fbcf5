"""Which mistake a failure to write is, and what was probably meant."""

import errno
import os

import pytest

from visor_jax.errors import RequestError, RunError, nearest, unwritable


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
    told = unwritable("--out=x", OSError(number, os.strerror(number)))
    assert type(told) is kind
    assert str(told) == f"--out=x: cannot be written: {os.strerror(number)}"


def test_near_names_are_told_best_first():
    assert nearest("Evaluat", ["generate", "evaluate"]) == "did you mean 'evaluate'?"
    assert nearest("xyzzy", ["generate", "evaluate"]) == ""
