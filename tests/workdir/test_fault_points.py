"""Fault points do nothing unless the environment names them."""

from __future__ import annotations

import os
import signal

import pytest

from visor_jax.workdir.fault_points import fault_point


def test_fault_points_are_quiet_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    monkeypatch.delenv("VISOR_TEST_KILL_AT", raising=False)
    fault_point("step", 7)
    monkeypatch.setenv("VISOR_TEST_KILL_AT", "step:7")
    fault_point("step", 6)
    fault_point("gc", 7)
    assert sent == []
    fault_point("step", 7)
    monkeypatch.setenv("VISOR_TEST_SIGNAL", "SIGUSR1,SIGTERM")
    fault_point("step", 7)
    assert [number for _, number in sent] == [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM]
