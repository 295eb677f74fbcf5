"""The cache of compiled programs, which are machine code: only this user can write it; it is never in a workdir."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from jax.experimental.compilation_cache import compilation_cache

from visor_jax.commands import recipe as stages
from visor_jax.files import read_write as files
from visor_jax.files.read_write import write_json
from visor_jax.scale.compiler_options import CACHE_VARIABLE, use_compile_cache
from visor_jax.testing import tiny_config


@pytest.fixture(autouse=True)
def nothing_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without settings and with the cache folder `tmp_path/cache`; restores JAX's settings afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name in ("JAX_COMPILATION_CACHE_DIR", CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def in_use() -> str | None:
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009, its type is not declared


def test_programs_lie_in_the_users_cache_folder_for_nobody_else(tmp_path: Path) -> None:
    assert use_compile_cache() == in_use() == str(tmp_path / "cache" / "visor_jax")
    assert stat.S_IMODE((tmp_path / "cache" / "visor_jax").stat().st_mode) == 0o700
    assert use_compile_cache() == str(tmp_path / "cache" / "visor_jax"), "a second call returns the same folder"


@pytest.mark.parametrize("base", ["", "relative"])
def test_without_a_usable_xdg_folder_it_is_below_home(tmp_path, monkeypatch, base) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert use_compile_cache() == str(tmp_path / "home" / ".cache" / "visor_jax")


def test_the_variable_names_another_folder_and_empty_means_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert use_compile_cache() == "" and in_use() is None
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert use_compile_cache() == str(tmp_path / "mine")


def test_what_the_user_told_jax_stays(tmp_path, monkeypatch) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    assert use_compile_cache() == in_use() == str(tmp_path / "jax")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert use_compile_cache() == "" and in_use() is None


def open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def link(folder: Path) -> None:
    (folder.parent.parent / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(folder.parent.parent / "elsewhere")


def plain_file(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("")


def in_a_workdir(folder: Path) -> None:
    write_json(folder.parent / "config.json", {"config": {}, "format": 1})


UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "others may write": (open_to_all, "others may write to it"),
    "a link": (link, "is not a folder"),
    "a file": (plain_file, "cache/visor_jax: File exists"),
    "a workdir": (in_a_workdir, "is in a workdir"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_folder_that_others_may_fill_is_not_used(tmp_path, caplog, name) -> None:
    make, message = UNSAFE[name]
    make(tmp_path / "cache" / "visor_jax")
    assert use_compile_cache() == "" and in_use() is None
    assert "compiled programs are not kept" in caplog.text and message in caplog.text


def test_another_users_folder_is_not_used(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "cache" / "visor_jax").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert use_compile_cache() == ""
    assert "belongs to user" in caplog.text


def test_a_run_ignores_what_lies_in_its_workdir_and_says_so(tiny_copy: Path, caplog) -> None:
    (tiny_copy / ".compiled").mkdir()
    config: Any = tiny_config()
    stages.run_stages(config, str(tiny_copy), config.stages)
    assert "run" not in Path(in_use() or "").parts
    assert caplog.text.count("no longer used") == 1


def test_a_bucket_keeps_programs_for_the_next_machine(tmp_path, monkeypatch) -> None:
    """`gs://` maps to a local folder here, through the package that would access the bucket."""

    class StandIn(DirFileSystem):
        def __init__(self, **settings):
            super().__init__(path=str(tmp_path / "bucket"), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path):
            return super()._join(path.removeprefix("gs://"))

    for name in ("gs", "gcs"):
        monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, name, StandIn)
    files._check_scheme.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv(CACHE_VARIABLE, "gs://programs/visor")
    assert use_compile_cache() == "gs://programs/visor"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
    backend.fsspec_backend._get_filesystem.cache_clear()
    files._check_scheme.cache_clear()
    assert [path.name for path in (tmp_path / "bucket" / "programs" / "visor").glob("jit__lambda*-cache")]


@pytest.mark.slow
def test_programs_in_a_bucket_are_read_back(bucket, bucket_server, monkeypatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(bucket))
    assert use_compile_cache(min_seconds=0.0) == str(bucket)

    def triple(x):
        return x * 3 - 1

    for _ in range(2):
        assert jax.jit(triple)(3.0) == 8.0
        jax.clear_caches()
    (program,) = (name for name in bucket_server.names("runs", bucket.name) if "jit_triple" in name)
    reads = [path for method, path in bucket_server.calls if method == "GET" and f"{program}?" in path]
    assert [path for path in reads if "alt=media" in path]


def test_a_program_that_another_process_is_still_writing_is_compiled_again(tmp_path, monkeypatch) -> None:
    """JAX writes an entry in place (only in process 0), so another process may read a part of it."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "programs"))
    use_compile_cache(min_seconds=0.0)

    def double(x):
        return x * 2 + 1

    assert jax.jit(double)(3.0) == 7.0
    entries = list((tmp_path / "programs").glob("jit_double*-cache"))
    assert len(entries) == 1
    entries[0].write_bytes(entries[0].read_bytes()[:-100])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert jax.jit(double)(3.0) == 7.0


def test_a_bucket_that_cannot_be_reached_is_one_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(fsspec, "get_filesystem_class", raises_import_error)
    files._check_scheme.cache_clear()
    monkeypatch.setenv(CACHE_VARIABLE, "gs://programs/visor")
    assert use_compile_cache() == ""
    assert "needs the package gcsfs" in caplog.text


def raises_import_error(scheme: str) -> None:
    raise ImportError(scheme)
