"""The manifest matches the sealed files and no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visor_jax.checkpoint.manifest import Damaged, Unfinished, examine, read_manifest, seal
from visor_jax.errors import RequestError

TREE = {"params/w": [[2, 3], "float32"]}


def sealed(folder: Path, files: dict[str, bytes], known: dict[str, Any] | None = None) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    seal(
        folder,
        int(folder.name),
        identity={"stage": "full"},
        meta={"position": 3},
        tree=TREE,
        items={"params": "arrays"},
        known=known,
    )
    return folder


def test_the_manifest_lists_sealed_files(tmp_path):
    manifest = examine(sealed(tmp_path / "7", {"arrays/d/x": b"abc", "arrays/y": b""}))
    assert (manifest.step, manifest.identity, manifest.meta, manifest.tree) == (
        7,
        {"stage": "full"},
        {"position": 3},
        TREE,
    )
    assert {name: entry["size"] for name, entry in manifest.files.items()} == {"arrays/d/x": 3, "arrays/y": 0}


def test_checksums_of_other_processes_are_taken_and_missing_ones_are_computed(tmp_path):
    files = {"arrays/x": b"abc", "arrays/y": b"defg"}
    expected = examine(sealed(tmp_path / "6", files)).files
    other = {"size": 3, "sha256": "0" * 64}
    assert examine(sealed(tmp_path / "7", files, {"arrays/y": expected["arrays/y"], "gone": other})).files == expected
    with pytest.raises(Damaged, match="arrays/x does not match its checksum"):
        examine(sealed(tmp_path / "8", files, {"arrays/x": other}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_single_flipped_bit_is_noticed(tmp_path_factory, data):
    folder = sealed(tmp_path_factory.mktemp("step") / "7", {"arrays/x": bytes(range(64)), "arrays/y": b"short"})
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    path = data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(Damaged):
        examine(folder)


def test_reasons_are_reported(tmp_path):
    folder = sealed(tmp_path / "7", {"arrays/x": b"abc"})
    (folder / "arrays" / "x").write_bytes(b"abcd")
    with pytest.raises(Damaged, match="arrays/x has 4 bytes instead of 3"):
        examine(folder)
    (folder / "arrays" / "x").write_bytes(b"abx")
    with pytest.raises(Damaged, match="arrays/x does not match its checksum"):
        examine(folder)
    (folder / "arrays" / "x").unlink()
    with pytest.raises(Damaged, match="arrays/x is missing"):
        examine(folder)


def test_a_file_too_many_is_noticed_but_not_what_file_systems_leave(tmp_path):
    folder = sealed(tmp_path / "7", {"arrays/x": b"abc"})
    (folder / "arrays" / ".nfs0001").write_bytes(b"")
    examine(folder)
    (folder / "arrays" / "z").write_bytes(b"")
    with pytest.raises(Damaged, match="arrays/z is not in its manifest"):
        examine(folder)


def test_not_committed_is_not_damaged(tmp_path):
    folder = sealed(tmp_path / "7", {"arrays/x": b"abc"})
    (folder / "commit.json").unlink()
    with pytest.raises(Unfinished, match=r"no commit\.json"):
        read_manifest(folder)
    with pytest.raises(Unfinished):
        read_manifest(tmp_path / "8")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_damage(tmp_path):
    folder = sealed(tmp_path / "7", {"arrays/x": b"abc"})
    (folder / "arrays" / "x").chmod(0)
    with pytest.raises(Damaged, match="cannot be read"):
        examine(folder)


def test_another_format_is_the_askers_to_mend(tmp_path, monkeypatch):
    folder = sealed(tmp_path / "7", {"arrays/x": b"abc"})
    monkeypatch.setattr("visor_jax.checkpoint.manifest.READS", (3,))
    with pytest.raises(RequestError, match="format 2; this version reads 3"):
        examine(folder)
