"""What a process checks before JAX connects it; `test_distributed.py` has the messages of real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from visor_jax.errors import RequestError
from visor_jax.scale import coordinator


def test_a_port_that_another_program_has_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RequestError, match=f"process 0 cannot listen on port {port} .Address already in use"):
            coordinator.check_free(f"10.0.0.1:{port}")
        coordinator.wait_for_coordinator(f"127.0.0.1:{port}", 0.0)
    coordinator.check_free(f"10.0.0.1:{port}")
    with pytest.raises(RequestError, match="process 0 does not answer within 0 s"):
        coordinator.wait_for_coordinator(f"127.0.0.1:{port}", 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the numbers are reserved on Linux only")
def test_a_number_is_reserved_by_a_process_and_not_by_its_forked_children() -> None:
    """A worker process that outlives a killed process must not keep the next one from starting."""
    reading, writing = os.pipe()
    child = f"""if True:
        import os, time
        from visor_jax.scale import coordinator
        coordinator.claim("10.0.0.1:1", 7)
        if os.fork() == 0:
            os.write({writing}, b"x")
            time.sleep(30)
        time.sleep(30)
    """
    process = subprocess.Popen([sys.executable, "-c", child], pass_fds=[writing], start_new_session=True)
    try:
        os.read(reading, 1)
        with pytest.raises(RequestError, match="JAX_PROCESS_ID=7: another process on this machine has this number"):
            coordinator.claim("10.0.0.1:1", 7)
        coordinator.claim("10.0.0.1:1", 8)
        process.kill()
        process.wait()
        coordinator.claim("10.0.0.1:1", 7)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        coordinator.release_claims()
