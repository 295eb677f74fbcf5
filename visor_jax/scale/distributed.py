"""Starts this process as one of several, and lets process 0 do and decide what is done and decided once.

In: the environment (a coordinator's address, Slurm, a TPU pod or slice, a JobSet). Out: `start` connects the processes;
`once` runs an action in process 0 and gives its result, or its error, to all; `Reports` brings small values of every
process to process 0 without touching the devices.

All of it uses JAX's coordination service, which process 0 hosts: a process that waits keeps reporting progress to its
own watchdog, and a process that fails says so, so that the others end within seconds, with its status, instead of
waiting in a collective operation. A process that is killed is noticed by its missing heartbeats.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed as service  # JAX offers its key-value store only here

from visor_jax.errors import ABORTED, INTERRUPTED, STOPPED, RequestError, RunError, from_os_error, one_line
from visor_jax.scale import coordinator
from visor_jax.scale.environment import EXPLICIT
from visor_jax.workdir.supervision import beat, before_exit, ignore_sigterm, leave

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

GRACE_SECONDS = 5.0  # for a process to report its own failure after another one's
_POLL_MS = 500
_FAILED, _LEFT, _DONE = "visor/failed", "visor/left", "visor/done"
_REASONS = {STOPPED: "was stopped by SIGTERM", INTERRUPTED: "was interrupted"}  # by signals, by status
# Words in errors of XLA's collective operations when a peer is gone.
_LOST = ("gloo", "nccl", "connection", "coordination", "heartbeat", "unavailable", "deadline_exceeded", "peer")

_counter = itertools.count()
_ending = threading.Event()
_limits = {"end": 300}  # seconds for the other processes to end after this one


# --- starting and ending ----------------------------------------------------------------------------------------------


def start(settings: Mapping[str, Any], heartbeat_timeout: int, connect_timeout: int) -> None:
    """Connects this process to the others of its run; to be called before any use of JAX's devices.

    Args:
      settings: `environment.process_settings`.
      heartbeat_timeout, connect_timeout: whole seconds.

    Raises:
      RequestError: the other processes cannot be reached.
    """
    count, address = settings.get("num_processes"), settings.get("coordinator_address", "")
    if count:
        coordinator.claim(address, settings["process_id"])
        if settings["process_id"]:
            coordinator.wait_for_coordinator(address, connect_timeout)
        elif "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            coordinator.check_free(address)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if count and "SLURM_LOCALID" not in os.environ:  # there it chooses the GPU of each process
        settings = {**settings, "cluster_detection_method": "deactivate"}
    text = f"not all of the {count} processes have" if count else "not all processes of this run have"
    timer = threading.Timer(connect_timeout, _give_up, [f"{text} connected within {connect_timeout} s"])
    timer.daemon = True
    timer.start()
    _limits["end"] = connect_timeout
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=connect_timeout + 30,  # JAX aborts with a stack trace; the timer is faster
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=connect_timeout,
        )
    except (RuntimeError, ValueError) as error:
        problem = one_line(str(error)).rstrip(".")
        if count:
            raise RequestError(f"environment: the processes of this run cannot be connected: {problem}") from error
        raise RequestError(
            f"environment: JAX does not find the other processes of this TPU pod or Slurm step ({problem}); expected"
            f" {', '.join(EXPLICIT)}, or JAX_NUM_PROCESSES=1 to run alone"
        ) from error
    finally:
        timer.cancel()
    if jax.default_backend() == "cpu":
        # JAX caches the program of process 0, and on CPU the collectives of the others hang in it (jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    _watcher.start()
    before_exit(_leave)
    if count and count != jax.process_count():
        raise RequestError(
            f"environment: JAX_NUM_PROCESSES={count}: process 0 was started with {jax.process_count()}; expected the"
            " same number in all processes"
        )
    log.info("process %d of %d, %d local devices", jax.process_index(), jax.process_count(), jax.local_device_count())


def _give_up(message: str) -> NoReturn:
    """Ends this process as for a wrong request, from a thread, while the main one waits in JAX."""
    print(f"visor: environment: {message}; expected the same address and number in all of them", file=sys.stderr)
    os._exit(2)


def started() -> bool:
    """Returns whether `start` has connected this process to others, perhaps only to itself."""
    return jax.distributed.is_initialized()


def several() -> bool:
    """Returns whether there are several processes."""
    return started() and jax.process_count() > 1


def finish(status: int, message: str = "") -> None:
    """Ends this process's part of the run: waits for the others after success or SIGTERM, and tells them of a failure.

    After a failure the process ends here, with `status`, or with that of a failure of another process that caused it:
    it could not leave the coordination service otherwise without waiting for processes that wait for it.
    """
    if not started():
        return
    if status in (0, STOPPED):
        ignore_sigterm()
        _wait_for_all()
        _ending.set()
        _watcher.join()  # the interpreter must not end while a thread waits in the service's client
        jax.distributed.shutdown()
        return
    if status == ABORTED and (failure := _failure_of_another()) is not None:
        _follow(failure)
    _leave(status, message)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _wait_for_all() -> None:
    """Waits until all processes are here, with a limit; a failure of another one meanwhile ends this one too."""
    done, count = f"{_DONE}/{jax.process_index()}", jax.process_count()
    deadline = time.monotonic() + _limits["end"]
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: JAX ends this process
        _client().key_value_set(done, "")
        while len(_client().key_value_dir_get(_DONE)) < count:
            if time.monotonic() > deadline:
                leave(ABORTED, f"not all of the {count} processes have ended within {_limits['end']} s")
            time.sleep(0.1)


def _leave(status: int, message: str = "") -> None:
    """Tells the others that this process ends; process 0, with which the coordination service ends, waits for them."""
    if _ending.is_set():
        return
    _announce(status, message or _REASONS.get(status, f"ended with status {status}"))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone if process 0 is
        _client().key_value_set(f"{_LEFT}/{jax.process_index()}", "")
        deadline = time.monotonic() + 2 * GRACE_SECONDS if is_main() else 0.0
        while time.monotonic() < deadline and len(_client().key_value_dir_get(_LEFT)) < jax.process_count():
            time.sleep(0.1)
        time.sleep(0.5 if is_main() else 0)  # the others say so just before they end


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an error of the runtime says that another process of the run is gone."""
    text = str(error).lower()
    return started() and isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in _LOST)


def _announce(status: int, message: str) -> None:
    text = json.dumps({"process": jax.process_index(), "status": status, "message": message})
    try:
        _client().key_value_set(_FAILED, text)
    except jax.errors.JaxRuntimeError:
        return  # another process failed first


def _failure_of_another() -> dict[str, Any] | None:
    """Returns what another process has announced; None if nothing within half a second."""
    try:
        text = _wait_for(_FAILED)
    except jax.errors.JaxRuntimeError:
        return None  # the coordination service has ended
    failure = None if text is None else json.loads(text)
    return failure if failure is not None and failure["process"] != jax.process_index() else None


def _watch_failures() -> None:
    """Runs in a thread: ends this process some seconds after another one has failed, and at once after a signal."""
    while not _ending.is_set():
        try:
            text = _wait_for(_FAILED)
        except jax.errors.JaxRuntimeError:
            return  # the coordination service has ended; JAX ends this process
        if text is None:
            continue
        failure = json.loads(text)
        if failure["process"] == jax.process_index():
            return
        if failure["status"] not in _REASONS:
            time.sleep(GRACE_SECONDS)  # this process may be about to fail for the same reason, with its own message
        if not _ending.is_set():
            _follow(failure)


def _follow(failure: Mapping[str, Any]) -> NoReturn:
    """Ends this process with the status of another one's failure, so that the launcher treats all of them alike."""
    leave(failure["status"], f"process {failure['process']}: {failure['message']}; stopping")


def _wait_for(key: str) -> str | None:
    """Returns a key's value; None if it is not set within half a second."""
    try:
        return _client().blocking_key_value_get(key, _POLL_MS)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _value_of(key: str, while_waiting: Callable[[], None] = beat) -> Any:
    """Waits for a key's value, JSON, and reports progress to the watchdog meanwhile."""
    while (text := _wait_for(key)) is None:
        while_waiting()
    return json.loads(text)


def _client() -> Any:
    return service.global_state.client


_watcher = threading.Thread(target=_watch_failures, name="peers", daemon=True)


# --- what is done once ------------------------------------------------------------------------------------------------


def process_index() -> int:
    """Returns the number of this process."""
    return jax.process_index()


def local_devices() -> dict[str, Any]:
    """Returns how many devices this process has, and of which kind."""
    return {"local devices": jax.local_device_count(), "device kind": jax.local_devices()[0].device_kind}


def is_main() -> bool:
    """Returns whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def once(action: Callable[[], ResultT]) -> ResultT:
    """Runs `action` in process 0 and returns its result, of JSON values, in all processes.

    All processes must call it, in the same order. It returns after the action has ended, so that what it wrote is
    there; the others report progress to their watchdogs while they wait.

    Raises:
      RequestError, RunError: the action raised it, in process 0; here it is raised in every process.
    """
    if not started():
        return action()
    key = f"visor/once/{next(_counter)}"
    if not is_main():
        return _answer_of(key)
    try:
        result = action()
    except (RequestError, RunError, OSError) as error:
        expected = from_os_error(error) if isinstance(error, OSError) else error
        if expected is not None:
            kind = "request" if isinstance(expected, RequestError) else "run"
            _client().key_value_set(key, json.dumps({"error": str(expected), "kind": kind}))
        raise
    _client().key_value_set(key, json.dumps({"result": result}))
    return result


def meet() -> None:
    """Waits until all processes are here, and reports progress to the watchdogs meanwhile; all must call it.

    It comes before a collective that processes reach at different times: there they would make no progress, and the
    first one on CPUs waits for 30 seconds only.
    """
    Reports("meet").exchange(0, None)
    once(lambda: None)


def _answer_of(key: str) -> Any:
    """Returns what process 0 answered, or raises its error."""
    answer = _value_of(key)
    if "error" in answer:
        raise (RequestError if answer["kind"] == "request" else RunError)(answer["error"])
    return answer["result"]


def check_equal(values: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same values, of JSON types, by name; all processes must call it.

    Processes with other values would compute programs that do not fit together, or wait for each other forever.

    Raises:
      RequestError: a process has another value; raised in every process.
    """
    mine = json.loads(json.dumps(values))
    reports = Reports("request").exchange(0, mine)

    def compare() -> None:
        for process, theirs in enumerate(reports):
            for name in {**mine, **theirs}:  # in the order given: another command has other flags too
                value, expected = theirs.get(name), mine.get(name)
                if value != expected:
                    raise RequestError(
                        f"{name}={value} in process {process}, {expected} in process 0: expected the same command,"
                        " configuration, versions and devices in all processes"
                    )

    once(compare)


def divided(
    name: str, items: Callable[[], Sequence[str]], work: Callable[[Sequence[str]], dict[str, Any]]
) -> dict[str, Any]:
    """Divides work among the processes, in any thread; all must call it with the same name, which no other call has.

    Waiting is not progress here: the thread's work goes on beside that of the main one, which the watchdog watches.

    Args:
      items: what is to be done, as process 0 knows it.
      work: does some of the items; returns a JSON value for each.

    Returns:
      in process 0 all values by item, elsewhere nothing.
    """
    if not several():
        return work(items())
    folder = f"visor/divided/{name}"
    if not is_main():
        mine = _value_of(f"{folder}/items", lambda: None)[jax.process_index() :: jax.process_count()]
        _client().key_value_set(f"{folder}/{jax.process_index()}", json.dumps(work(mine)))
        return {}
    everything = list(items())
    _client().key_value_set(f"{folder}/items", json.dumps(everything))
    values = work(everything[:: jax.process_count()])
    for process in range(1, jax.process_count()):
        values |= _value_of(f"{folder}/{process}", lambda: None)
    _client().key_value_delete(folder)
    return values


class Reports:
    """Values of every process for process 0, step by step; nothing passes through the devices."""

    def __init__(self, name: str) -> None:
        self._name = f"visor/reports/{next(_counter)}/{name}"

    def exchange(self, step: int, value: Any) -> Sequence[Any]:
        """Returns the values of all processes in process 0, in their order, and only the own one elsewhere.

        Args:
          step: a number that no earlier call had; all processes make the same calls.
          value: JSON values.
        """
        if not started():
            return [value]
        folder = f"{self._name}/{step}"
        if not is_main():
            _client().key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
            return [value]
        others = [_value_of(f"{folder}/{process}") for process in range(1, jax.process_count())]
        _client().key_value_delete(folder)
        return [value, *others]
