"""What a process checks before JAX connects it to the others, so that a mistake ends in a message and not in an abort.

In: the address of process 0 and the number of this one. JAX (0.10.2) aborts two processes with one number, crashes
where process 0 cannot listen on its port, and prints stack traces where it does not answer. No JAX import.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from visor_jax.errors import RequestError

_claims: list[socket.socket] = []  # kept open until this process ends


def claim(address: str, index: int) -> None:
    """Reserves this process's number until it ends.

    Only processes on this machine can be recognized. The name is one of Linux's abstract sockets, not a file.

    Raises:
      RequestError: another process has the number.
    """
    if sys.platform != "linux":
        return
    reserved = socket.socket(socket.AF_UNIX)
    _claims.append(reserved)
    try:
        reserved.bind(f"\0visor/{address}/{index}")
    except OSError as error:
        raise RequestError(
            f"environment: JAX_PROCESS_ID={index}: another process on this machine has this number and"
            f" JAX_COORDINATOR_ADDRESS={address}; expected another number for each process of a run, and another port"
            " for each run"
        ) from error


def release_claims() -> None:
    """Releases the numbers in a forked child, which may outlive this process."""
    for reserved in _claims:
        reserved.close()
    _claims.clear()


os.register_at_fork(after_in_child=release_claims)


def check_free(address: str) -> None:
    """Checks that process 0 can listen on the port.

    Raises:
      RequestError: another program has the port.
    """
    port = int(address.rpartition(":")[2])
    several_families = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if several_families else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if several_families:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RequestError(
                f"environment: JAX_COORDINATOR_ADDRESS={address}: process 0 cannot listen on port {port}"
                f" ({error.strerror}); expected a free port of its machine"
            ) from error


def wait_for_coordinator(address: str, seconds: float) -> None:
    """Waits until process 0 listens.

    Raises:
      RequestError: it does not listen within `seconds`.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RequestError(
                    f"environment: JAX_COORDINATOR_ADDRESS={address}: process 0 does not answer within {seconds:g} s"
                    f" ({error}); expected its address, and that it runs"
                ) from error
        time.sleep(0.2)
