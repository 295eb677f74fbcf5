"""Shared by all tests: JAX on the CPU, a hypothesis profile without time limits, a small trained run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports JAX. Tests that simulate several devices use separate processes.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX refuses to broadcast arrays of different ranks unless the code adds the axes. Child processes inherit this.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import jaxtyping
import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from visor_jax.testing.bucket import BucketServer

# Calls of functions in these packages are checked against their annotations, including shapes and dtypes. Installed
# before any test imports them.
CHECKED = ("visor_jax.kernels", "visor_jax.model", "visor_jax.train")
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# Shared machines stall sometimes: a deadline would fail tests because of other processes.
settings.register_profile("visor", deadline=None, print_blob=True)
settings.load_profile("visor")


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Turns the checks of annotations off, for tests of the package's own validation."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- one small trained run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def compiled(of_all_workers: Path) -> str:
    """Folder of compiled programs, so that training the same stage again compiles nothing."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(of_all_workers / "compiled")


@contextlib.contextmanager
def _quick(compiled: str) -> Iterator[None]:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from visor_jax.scale.compiler_options import QUICK

    changes = {"jax_compilation_cache_dir": compiled, "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX checks for a cache only once, at the first compilation
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def quick(compiled: str) -> Iterator[None]:
    """Programs compile several times faster, but run slower; equal programs are compiled once."""
    with _quick(compiled):
        yield


@pytest.fixture(scope="session")
def tiny_run(compiled: str, of_all_workers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with all stages and the evaluation of `visor_jax.testing.tiny_config`. Tests must not change it.

    The first process that needs it trains it; each has its own copy, which commands may lock.
    """
    from visor_jax import loading
    from visor_jax.commands import recipe
    from visor_jax.evaluate.runner import evaluate
    from visor_jax.testing import tiny_config
    from visor_jax.workdir.folder import Workdir

    path, complete = of_all_workers / "tiny" / "run", of_all_workers / "tiny" / "complete"
    with FileLock(of_all_workers / "tiny.lock"):
        if not complete.exists():
            config = tiny_config()
            with _quick(compiled):
                recipe.run_stages(config, str(path), config.stages)
                evaluate(config, loading.load(path), Workdir(path))
            complete.touch()
    return Path(shutil.copytree(path, tmp_path_factory.mktemp("tiny_run") / "run"))


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run`, which the test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


# --- a bucket ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[BucketServer]:
    """A stand-in for Google Cloud Storage with the bucket "runs"; this process and its children reach it as gs://."""
    if importlib.util.find_spec("gcsfs") is None:  # importing it reads the variables
        pytest.skip("the extra [gcs] is not installed")
    from visor_jax.testing.bucket import BucketServer

    with BucketServer("runs") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(bucket_server: BucketServer) -> Iterator[Path]:
    """A new folder of the bucket."""
    from visor_jax.files.read_write import as_path

    name = f"test{len(bucket_server.calls)}"
    yield as_path(f"gs://runs/{name}")
    bucket_server.refused = None


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pytorch_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, because more do not speed up tiny tensors; remote code is copied into one folder per session."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        yield
