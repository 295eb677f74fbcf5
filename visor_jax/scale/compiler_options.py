"""Chooses XLA's compiler options, and the folder of the persistent compilation cache.

In: parameters. Out: `compiler_options` for `jax.jit`; None keeps XLA's defaults. On CPU, a small model's programs that
run only a few times (initialization, answers, the comparison of an export) take longer to compile than to run; lower
optimization compiles them several times faster into slower programs. A large model's programs use Eigen for matrix
products, which is a tenth faster than XLA's default.

Compiled programs are machine code, so the cache is in a folder that only this user can write (`use_compile_cache`),
never in a workdir, which may come from another user.
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

CACHE_VARIABLE = "VISOR_COMPILE_CACHE"  # another folder, local or in a bucket; empty disables the cache
MIN_COMPILE_SECONDS = 0.3  # programs that compile faster are not cached
SMALL = 5_000_000  # parameters
QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # removed in later versions
    QUICK["xla_cpu_use_fusion_emitters"] = False
LARGE = {"xla_cpu_experimental_ynn_fusion_type": ""}


def options(params: Any) -> dict[str, bool | int | str] | None:
    """Returns the options for a program over `params` (arrays or shapes) that runs only a few times."""
    if jax.default_backend() != "cpu":
        return None
    small = sum(leaf.size for leaf in jax.tree.leaves(params)) <= SMALL
    return dict(QUICK) if small else dict(LARGE)


# --- compilation cache ------------------------------------------------------------------------------------------------


def use_compile_cache(workdir: Path | None = None, min_seconds: float = MIN_COMPILE_SECONDS) -> str:
    """Enables the persistent compilation cache; to be called before the first compilation.

    The cache is `$XDG_CACHE_HOME/visor_jax` (`~/.cache/visor_jax`), created with mode 0700. The environment variable
    `VISOR_COMPILE_CACHE` names another folder, also in a bucket (`gs://...`), so that a machine that replaces a
    preempted one need not compile again; an empty value disables the cache. It is a variable and not a configuration
    field, because a workdir contains a configuration. A cache that the user has set in JAX
    (`JAX_COMPILATION_CACHE_DIR`) is kept. A local folder that belongs to another user or is writable by others is
    rejected with a warning.

    Args:
      workdir: a run's folder, in which earlier versions kept compiled programs; logs that they are ignored.
      min_seconds: a program that compiles faster is not cached.

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
    """Returns the cache folder that the user chose; "" to disable the cache."""
    if (named := os.environ.get(CACHE_VARIABLE)) is not None:
        return os.fspath(Path(named).expanduser().absolute()) if named and "://" not in named else named
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.fspath((Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "visor_jax")


def _private_folder(folder: str) -> str:
    """Creates the folder if needed, and checks that no other user can write to it.

    Raises:
      OSError, RequestError: it cannot be created, is not a folder, belongs to another user, or is writable by others.
    """
    if not folder or "://" in folder:
        if folder:
            as_path(folder)  # raises if a package for this bucket is missing
        return folder
    path = Path(folder)
    if any(is_workdir(parent) for parent in path.resolve().parents):
        raise RequestError(f"{folder} is in a workdir, which may hold other users' files")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise RequestError(f"{folder} is not a folder (or a link to one)")
    if info.st_uid != os.geteuid():
        raise RequestError(f"{folder} belongs to user {info.st_uid}, expected {os.geteuid()}")
    if info.st_mode & 0o022:
        raise RequestError(f"{folder} has mode {stat.S_IMODE(info.st_mode):o}: others may write to it; expected 700")
    return folder
