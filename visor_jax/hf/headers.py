"""Reads the headers of a folder's safetensors files and indexes every tensor by its canonical key.

In: a folder. Out: file, name, shape and dtype of each tensor, by canonical key; no tensor data is read. Prefixes that
PyTorch's wrappers add (`module.`, `_orig_mod.`, ...) are removed. Files of another layout (LLaVA's original one, an
adapter, FSDP's flat shards) are rejected with a message that names the fix.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from visor_jax.errors import RequestError
from visor_jax.files.read_write import open_regular
from visor_jax.hf.config import CONVERT, MERGE
from visor_jax.hf.keys import canonical_key, unwrapped
from visor_jax.hf.section import read_object

log = logging.getLogger(__name__)
MAX_HEADER_BYTES, MAX_TENSORS, MAX_FILES = 4 * 2**20, 10_000, 1000  # 72B: 0.2 MB, 1,500 tensors, 31 files
_SPARSE = 8  # a file this many times longer than its disk usage is sparse and holds no weights


@dataclass(frozen=True)
class Stored:
    """Location, shape and dtype of one stored tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def locate(folder: Path) -> dict[str, Stored]:
    """Returns every tensor of a folder by its canonical key.

    Raises:
      RequestError: the folder has no safetensors, a shard is missing or damaged, two tensors have the same canonical
        key, or the names belong to another layout.
    """
    files, tensors = _files(folder), dict[str, Stored]()
    for file in files:
        for stored in _headers(file):
            key = canonical_key(stored.name)
            if key in tensors:
                raise RequestError(
                    f"{file}: {shown(stored.name)} is in {tensors[key].file.name} too, as {shown(tensors[key].name)}"
                )
            tensors[key] = stored
        if len(tensors) > MAX_TENSORS:
            raise RequestError(f"{file}: more than {MAX_TENSORS:,} tensors; expected those of one model")
    names = [stored.name for stored in tensors.values()]
    _check_layout(folder, names)
    wrapped = [name for name in names if unwrapped(name) != name]
    if wrapped:
        log.info("%s: tensors such as %s: read without the names of PyTorch's wrappers", folder, shown(wrapped[0]))
    return tensors


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():  # transformers also reads only this file if it exists
        return [single]
    files = [folder / name for name in _shards(index)] if index.exists() else list(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in folder.iterdir() if re.fullmatch(r".*\.(bin|pth?|ckpt)", file.name))
        instead = f" ({listed(list(map(shown, others)), 2)}: pickles are never read)" if others else ""
        raise RequestError(f"{folder}: no .safetensors{instead}; expected model.safetensors, or shards and their index")
    if len(files) > MAX_FILES:
        raise RequestError(f"{folder}: {len(files):,} .safetensors; expected at most {MAX_FILES:,}")
    return sorted(files)


def _shards(index: Path) -> set[str]:
    """Returns the file names in an index; only plain names are accepted, so that none leads out of the folder."""
    table = read_object(index).get("weight_map")
    names = table.values() if isinstance(table, dict) else []
    if not (names and all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names)):
        raise RequestError(f"{index}: weight_map: expected for each tensor the name of a .safetensors file next to it")
    return set(names)


def _headers(file: Path) -> Iterator[Stored]:
    try:
        table = _header(file)
        with safe_open(file, "numpy"):  # checks that the tensors fill the file exactly
            pass
    except FileNotFoundError:
        raise RequestError(f"{file}: no such file; the index names it") from None
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise RequestError(f"{file}: no whole safetensors file: {shown(str(error))}") from error
    for name, entry in table.items():
        yield Stored(file, name, tuple(entry["shape"]), entry["dtype"])


def _header(file: Path) -> dict[str, Any]:
    """Reads the JSON header of a safetensors file, without its metadata; raises OSError and ValueError."""
    with open_regular(file) as opened:
        info = os.fstat(opened.fileno())
        # Some file systems report no blocks.
        if info.st_blocks and info.st_size > _SPARSE * 512 * info.st_blocks + 2**20:
            raise ValueError(f"{info.st_size:,} bytes long with {512 * info.st_blocks:,} on the disk")
        size = int.from_bytes(opened.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        table = json.loads(opened.read(size).decode(), object_pairs_hook=_unique_names)
    if not isinstance(table, dict):
        raise ValueError(f"the header holds {type(table).__name__}, expected an object")
    table.pop("__metadata__", None)
    if len(table) > MAX_TENSORS:
        raise ValueError(f"{len(table):,} tensors, expected at most {MAX_TENSORS:,}")
    return table


def _unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object and rejects duplicate names, which readers resolve differently."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in the header twice")
    return table


def _check_layout(folder: Path, names: Sequence[str]) -> None:
    """Raises RequestError for layouts that other programs save; the message says how to convert them."""
    adapter = r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|prompt_encoder)(\.|$)"
    kinds = {
        adapter: f"a PEFT adapter that is not merged; {MERGE}",
        r"_flat_param": "FSDP's flat shards; save the model with StateDictType.FULL_STATE_DICT",
        r"^model\.(layers\.|mm_projector\.|vision_tower\.vision_tower\.)": CONVERT,
    }
    for pattern, kind in kinds.items():
        example = next((name for name in map(unwrapped, names) if re.search(pattern, name)), None)
        if example is not None:
            raise RequestError(f"{folder}: tensors such as {shown(example)} are of {kind}")


# --- text for messages ------------------------------------------------------------------------------------------------


def shown(name: str, length: int = 120) -> str:
    """Escapes unprintable text from outside for a terminal and shortens it to `length` characters."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= length else f"{name[: length - 3]}..."


def listed(names: Sequence[str], count: int) -> str:
    """Lists the first `count` names, as "a, b and 3 more"."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest:,} more" if rest > 0 else "")
