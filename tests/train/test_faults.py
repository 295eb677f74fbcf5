"""Faults: SIGTERM is a question, a hang ends with 134, a step that is not finite changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import visor_jax.errors
from visor_jax.errors import RunError
from visor_jax.train.faults import BadSteps, StopSignal, Watchdog, fault_point, keep_if_finite

ROOT = Path(visor_jax.errors.__file__).parents[1]


def start(script: str) -> subprocess.Popen[str]:
    """A Python process that runs `script`; it prints "ready" when it may be signalled."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- SIGTERM and SIGUSR1 ----------------------------------------------------------------------------------------------


def test_sigterm_is_answered_after_the_step_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop(2)
        assert stop.should_stop(3)
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignal() as stop:
        assert not stop.should_stop(1), "a new run does not inherit the signal"


def test_sigterm_while_there_is_nothing_to_save_ends_the_process_at_once():
    process = start("""
        import time
        from visor_jax.train.faults import StopSignal
        with StopSignal() as stop, stop.nothing_to_save():
            print("ready", flush=True)
            time.sleep(60)
    """)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - began < 10


def test_sigusr1_dumps_stacks_and_goes_on():
    process = start("""
        import os, signal
        from visor_jax.train.faults import StopSignal
        def a_telling_name():
            os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignal():
            a_telling_name()
        print("went on")
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "went on\n")
    assert "a_telling_name" in err


# --- the watchdog -----------------------------------------------------------------------------------------------------


def test_a_hang_dumps_stacks_and_aborts_with_134():
    process = start("""
        import time
        from visor_jax.train.faults import Watchdog
        def stuck_in_a_barrier():
            time.sleep(60)
        with Watchdog(1.0) as watchdog:
            for _ in range(10):
                time.sleep(0.2)  # longer than a second in all
                watchdog.beat()
            print("alive", flush=True)
            stuck_in_a_barrier()
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (134, "alive\n")
    assert "stuck_in_a_barrier" in err and "train.hang_seconds" in err


def test_the_watchdog_ends_with_its_block_and_zero_turns_it_off():
    with Watchdog(0.2):
        pass
    with Watchdog(0):
        time.sleep(0.5)


# --- steps that are not finite ----------------------------------------------------------------------------------------


def test_a_nan_step_changes_neither_parameters_nor_optimiser_state():
    tx = optax.adam(0.1)

    @jax.jit
    def update(params, state, x):
        loss, gradients = jax.value_and_grad(lambda p: jnp.sum(p["w"] * x))(params)
        updates, new_state = tx.update(gradients, state, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(gradients))
        return keep_if_finite(finite, (optax.apply_updates(params, updates), new_state), (params, state))

    params = {"w": jnp.arange(4.0)}
    state = tx.init(params)
    params, state = update(params, state, jnp.ones(4))
    for _ in range(20):
        for bad in (jnp.nan, jnp.inf):
            after = update(params, state, jnp.ones(4).at[2].set(bad))
            for old, new in zip(jax.tree.leaves((params, state)), jax.tree.leaves(after), strict=True):
                assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    moved, _ = update(params, state, jnp.ones(4))
    assert not np.array_equal(moved["w"], params["w"])


def test_bad_steps_in_a_row_end_the_run_and_name_the_samples():
    bad = BadSteps(3)
    for step, finite in enumerate([False, False, True, False, False]):
        bad.observe(step, finite, ["a", "b"])
    assert bad.in_row == 2
    with pytest.raises(RunError, match=r"step 5: .*3 steps in a row.*glyph-17, glyph-18"):
        bad.observe(5, False, ["glyph-17", "glyph-18"])


def test_none_allowed_means_the_first_one_ends_the_run():
    with pytest.raises(RunError):
        BadSteps(0).observe(1, False, ["a"])


# --- fault points -----------------------------------------------------------------------------------------------------


def test_fault_points_are_quiet_unless_named(monkeypatch):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    monkeypatch.delenv("VISOR_TEST_KILL_AT", raising=False)
    fault_point("step", 7)
    monkeypatch.setenv("VISOR_TEST_KILL_AT", "step:7")
    fault_point("step", 6)
    fault_point("gc", 7)
    assert killed == []
    fault_point("step", 7)
    assert killed == [(os.getpid(), signal.SIGKILL)]
