"""Signals and hangs: SIGTERM ends a command at once or after the step, SIGINT is never suppressed, a hang is 134."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import visor_jax.errors
from visor_jax.workdir.supervision import beat, supervised, was_interrupted, watched

ROOT = Path(visor_jax.errors.__file__).parents[1]


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    """Starts a Python process that runs `script`, which prints "ready" when it may be signaled."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signaled(script: str, *numbers: signal.Signals) -> tuple[int, str, str]:
    """Runs `script`, sends the signals when it is ready; returns exit status, stdout after that and stderr."""
    process = start(script)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


def test_a_held_sigterm_is_answered_after_the_step_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped, supervised() as stop, stop.until_complete("full"):
        stop.hold()
        assert not stop.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop()
        assert stop.should_stop()
    assert stopped.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with supervised() as stop:
        assert not stop.should_stop(), "a new run does not inherit the signal"


def test_one_stop_for_a_whole_command():
    with supervised() as outer, supervised() as inner:
        assert inner is outer
        with inner.until_complete("full"):
            inner.hold()
        assert not outer._held, "after a stage there is nothing to save"


def test_a_signal_in_a_stages_end_is_obeyed_once_it_is_complete():
    """A signal that arrives while the last step is saved counts, whatever the loop polled before."""
    done = []
    with pytest.raises(SystemExit) as stopped, supervised() as stop, stop.until_complete("full"):
        stop.hold()
        assert not stop.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("complete")
    assert stopped.value.code == 143 and done == ["complete"]


def test_a_failure_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), supervised() as stop, stop.until_complete("full"):
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError


UNINTERRUPTIBLE = """
    import random, sys, zlib
    from visor_jax.workdir.supervision import supervised, watched
    data = random.Random(0).randbytes(1 << 25)
    def compile():  # like XLA: the main thread runs no Python for seconds
        for _ in range(40):
            zlib.compress(data, 9)
    with supervised() as stop, watched({hang_seconds}):
        print("ready", flush=True)
        for _ in range(4):
            zlib.compress(data, 9)
        {then}
"""


def test_sigterm_while_there_is_nothing_to_save_ends_the_process_whatever_runs():
    script = UNINTERRUPTIBLE.format(hang_seconds=600, then="compile()")
    began = time.monotonic()
    status, _, err = signaled(script, signal.SIGTERM)
    assert status == 143 and "nothing to save" in err
    assert "Traceback" not in err and time.monotonic() - began < 40


def test_what_has_to_be_done_before_an_exit_at_once_is_done(tmp_path):
    script = f"""
        import time
        from pathlib import Path
        from visor_jax.workdir.lock import WorkdirLock
        from visor_jax.workdir import supervision
        supervision.LEAVE_SECONDS = 2.0
        with supervision.supervised() as stop, WorkdirLock(Path({str(tmp_path)!r}) / "lock.json"):
            stop.before_exit(lambda status: time.sleep(60))  # a hanging action does not delay the exit
            print("ready", flush=True)
            time.sleep(60)
    """
    assert signaled(script, signal.SIGTERM)[0] == 143
    assert not (tmp_path / "lock.json").exists(), "the lock is released"


def test_a_forked_child_s_signals_are_its_own():
    script = """
        import os, signal, time
        from visor_jax.workdir.supervision import supervised
        reading, writing = os.pipe()
        with supervised() as stop, stop.until_complete("full"):
            stop.hold()
            child = os.fork()
            if not child:
                os.write(writing, b"!")
                time.sleep(60)
                os._exit(0)
            os.read(reading, 1)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.1)
            assert not stop.should_stop()
    """
    process = start(script)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


def test_outside_the_main_thread_nothing_is_touched():
    stops = []

    def work() -> None:
        with supervised() as stop, stop.until_complete("full"), watched(600):
            stop.hold()
            beat()
            stops.append(stop.should_stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stops == [False]


# --- SIGINT and SIGUSR1 -----------------------------------------------------------------------------------------------


def test_a_suppressed_interrupt_is_raised_at_the_next_beat():
    with pytest.raises(KeyboardInterrupt), supervised(), watched(600):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except BaseException:
            assert was_interrupted()
        beat()
        pytest.fail("went on")
    assert not was_interrupted()


def test_an_interrupt_that_nobody_hears_ends_a_watched_command():
    script = """
        import time
        from visor_jax.workdir.supervision import supervised, watched
        with supervised(), watched(600):
            for _ in range(3):
                try:
                    print("ready", flush=True)
                    time.sleep(60)
                except BaseException:
                    pass
    """
    assert signaled(script, signal.SIGINT)[0] == 130


def test_who_handles_interrupts_goes_on():
    """In a chat, which has no watchdog, SIGINT may end only an answer."""
    script = """
        import time
        from visor_jax.workdir import supervision
        supervision.GRACE_SECONDS = 0.2
        with supervision.supervised():
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                time.sleep(1)
                print("next question")
    """
    assert signaled(script, signal.SIGINT)[:2] == (0, "next question\n")


def test_sigusr1_dumps_stacks_and_goes_on():
    script = """
        import os, signal
        from visor_jax.workdir.supervision import supervised
        def a_telling_name():
            os.kill(os.getpid(), signal.SIGUSR1)
        with supervised():
            a_telling_name()
        print("went on")
    """
    process = start(script)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "went on\n")
    assert "a_telling_name" in err


# --- the watchdog -----------------------------------------------------------------------------------------------------


def test_a_hang_dumps_stacks_and_aborts_with_134():
    process = start("""
        import time
        from visor_jax.workdir.supervision import beat, watched
        def stuck_in_a_barrier():
            time.sleep(60)
        with watched(1.0):
            for _ in range(10):
                time.sleep(0.2)  # longer than a second in all
                beat()
            print("alive", flush=True)
            stuck_in_a_barrier()
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (134, "alive\n")
    assert "stuck_in_a_barrier" in err and "train.hang_seconds" in err


def test_the_watchdog_ends_with_its_block_and_zero_turns_it_off():
    with watched(0.2):
        pass
    with watched(0), watched(0):
        time.sleep(0.5)
    beat()


def test_a_stage_has_a_limit_of_its_own():
    process = start("""
        import time
        from visor_jax.workdir.supervision import watched
        with watched(1.0):
            with watched(600.0):
                time.sleep(2.5)
            print("inner limit held", flush=True)
            time.sleep(60)
    """)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (134, "inner limit held\n")
