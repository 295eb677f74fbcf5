"""Files of another process are waited for, with a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.workdir import visible
from visor_jax.workdir.visible import wait_until


def test_a_file_that_appears_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = []
    monkeypatch.setattr(visible, "beat", lambda: beats.append(1))
    monkeypatch.setattr(visible.time, "sleep", lambda seconds: (tmp_path / "file").touch())
    assert wait_until((tmp_path / "file").exists)
    assert beats == [1], "the watchdog knows of the wait"


def test_a_file_that_never_appears_is_waited_for_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visible, "SECONDS", 0.0)
    assert not wait_until((tmp_path / "file").exists)
