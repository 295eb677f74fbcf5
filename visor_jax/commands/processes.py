"""Starts a command as one of several processes, compares what they were asked for, and ends this one's part.

In: the environment, the parsed command. JAX is imported only where there are several processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from visor_jax import __version__
from visor_jax.workdir.supervision import Stop

if TYPE_CHECKING:
    from visor_jax.config import Config


def start(stop: Stop) -> bool:
    """Connects this process to the others of its run, if the environment names others.

    Returns:
      whether it is one of several, and not process 0.

    Raises:
      RequestError: the environment is incomplete, or the others cannot be reached.
    """
    from visor_jax.scale.environment import CONNECT, HEARTBEAT, process_settings, seconds

    if (settings := process_settings(os.environ)) is None:
        return False
    from visor_jax.scale import distributed

    distributed.start(settings, seconds(HEARTBEAT, os.environ), seconds(CONNECT, os.environ))
    stop.take_sigterm()
    return not distributed.is_main()


def index() -> int:
    """Returns the number of this process."""
    module = distributed()
    return module.process_index() if module is not None else 0


def check_request(name: str, args: argparse.Namespace, config: Config | None) -> None:
    """Checks that all processes were started with the same command; paths may differ between machines.

    Raises:
      RequestError: flags, a field of the configuration, a version, or number or kind of a process's devices differ.
    """
    if (module := distributed()) is None:
        return
    from visor_jax.workdir.provenance import flat_fields, git_commit, plain, versions

    aside = ("workdir", "config", "json", "config.FIELD")  # the last one exists for the help only
    flags = {f"--{flag}": str(value) for flag, value in vars(args).items() if flag not in aside}
    fields = {} if config is None else dict(flat_fields(plain(config)))
    installed = {package: version for package, version in versions().items() if package in ("jax", "jaxlib")}
    code = {"version": __version__, "commit": git_commit()}
    fixed = {"command": name, **code, **installed, **module.local_devices()}
    module.check_equal({**fixed, **flags, **fields})


def distributed() -> Any:
    """Returns the module `visor_jax.scale.distributed` if it has connected several processes, else None."""
    module = sys.modules.get("visor_jax.scale.distributed")
    return module if module is not None and module.started() else None


def finish(status: int, message: str = "") -> None:
    """Ends this process's part of the run with an exit status; see `visor_jax.scale.distributed.finish`."""
    if (module := distributed()) is not None:
        module.finish(status, message)
