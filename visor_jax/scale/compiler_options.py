"""How much XLA may do about a program, and where compiled programs are kept.

In: parameters. Out: `compiler_options` for `jax.jit`. None leaves XLA at its best. On CPU, programs of a small model
that run only a few times (a random start, answers, an export's proof) take longer to compile than they will ever run:
they are compiled several times faster, into programs that run slower. Those of a large model leave matrix products to
Eigen, which is a tenth faster at them than XLA's own choice.

Compiled programs are machine code, so they are kept where only this user can write (`use_compile_cache`), never in a
workdir: that may come from somebody else.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from visor_jax.config import is_workdir
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path

log = logging.getLogger(__name__)

CACHE_VARIABLE = "VISOR_COMPILE_CACHE"  # names another folder or a bucket's; empty: nothing is kept
MIN_COMPILE_SECONDS = 0.3  # what compiles faster is not worth a file
SMALL = 5_000_000  # parameters
QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
LARGE = {"xla_cpu_experimental_ynn_fusion_type": ""}


def options(params: Any) -> dict[str, bool | int | str] | None:
    """Options for a program over `params` (arrays or their shapes) that is run a few times, as answers are."""
    if jax.default_backend() != "cpu":
        return None
    small = sum(leaf.size for leaf in jax.tree.leaves(params)) <= SMALL
    return dict(QUICK) if small else dict(LARGE)


# --- where compiled programs are kept ---------------------------------------------------------------------------------


def use_compile_cache(workdir: Path | None = None, min_seconds: float = MIN_COMPILE_SECONDS) -> str:
    """Keep compiled programs from one process to the next; to be called before the first one is compiled.

    They lie in `$XDG_CACHE_HOME/visor_jax` (`~/.cache/visor_jax`), made with mode 0700. The environment variable
    `VISOR_COMPILE_CACHE` names another folder, or one on a bucket (`gs://...`), so that a machine that takes over from
    a preempted one compiles nothing anew; empty, nothing is kept. It is a variable and no field of the configuration,
    because a workdir carries a configuration. A cache that the user has chosen through JAX itself
    (`JAX_COMPILATION_CACHE_DIR`) stays as it is. A local folder of another user, or one that others may write to, is
    not used: a warning says why.

    Args:
      workdir: a run's folder, in which earlier versions kept compiled programs; that they are ignored is logged.
      min_seconds: a program that compiles faster is not kept.

    Returns:
      The folder in use; "" for none.
    """
    if workdir is not None and "://" not in os.fspath(workdir) and (workdir / ".compiled").exists():
        log.warning(
            "%s: no longer used, compiled programs are kept elsewhere; it may be removed", workdir / ".compiled"
        )
    chosen = getattr(jax.config, "jax_compilation_cache_dir", None)
    if chosen or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return chosen or ""
    try:
        folder = _private_folder(_cache_folder())
    except (OSError, RuntimeError, RequestError) as error:
        problem = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        log.warning("compiled programs are not kept: %s (%s names another folder)", problem, CACHE_VARIABLE)
        return ""
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
        compilation_cache.reset_cache()  # JAX looks for a cache once, at its first compilation
    return folder


def _cache_folder() -> str:
    """Where the user wants compiled programs; "" for nowhere."""
    if (named := os.environ.get(CACHE_VARIABLE)) is not None:
        return os.fspath(Path(named).expanduser().absolute()) if named and "://" not in named else named
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.fspath((Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "visor_jax")


def _private_folder(folder: str) -> str:
    """`folder`, made where need be, once it is seen that nobody else can put programs into it.

    Raises:
      OSError, RequestError: it cannot be made, is no folder, belongs to another user, or is open to others.
    """
    if not folder or "://" in folder:
        if folder:
            as_path(folder)  # names the package that is missing, if one is
        return folder
    path = Path(folder)
    if any(is_workdir(parent) for parent in path.resolve().parents):
        raise RequestError(f"{folder} lies in a workdir, which may hold other people's files")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise RequestError(f"{folder} is no folder of its own")
    if info.st_uid != os.geteuid():
        raise RequestError(f"{folder} belongs to user {info.st_uid}, expected {os.geteuid()}")
    if info.st_mode & 0o022:
        raise RequestError(f"{folder} has mode {stat.S_IMODE(info.st_mode):o}: others may write to it; expected 700")
    return folder
