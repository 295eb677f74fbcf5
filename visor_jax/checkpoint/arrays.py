"""Saves and loads trees of arrays with Orbax; no other file uses it.

In: trees with named top-level items ({"params": ..., "opt_state": ...}). Out: a folder with one folder for each item in
Orbax's format, so that an item can be read alone. Each holds nested dicts named by an array's path in the tree,
whatever the tree's containers: the names on disk are those of the parameters and do not depend on Optax's or JAX's
types. Reading first checks names, shapes and dtypes (Orbax casts silently) and places the arrays on any mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from visor_jax.errors import RequestError
from visor_jax.tree import flatten, unflatten

UNFINISHED_MARK = "orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not finished writing
INDEX = "manifest.ocdbt"  # in the folder of an item: where all its arrays are
# Target size of a file of arrays, whose content is held in memory until the file is full; the smaller sizes are used
# when memory is short, and arrays are then encoded in chunks.
FILE_BYTES, SHORT_FILE_BYTES, CHUNK_BYTES = 128 * 2**20, 32 * 2**20, 16 * 2**20
BUCKET_MARK = "commit_success.txt"  # Orbax writes it last in a bucket, where it cannot rename a finished folder
_SHOWN = 6  # problems named in a message


class ArraySaver:
    """Writes trees in the background, one at a time. After an error, close it and create another one.

    Args:
      copied_bytes: maximum number of bytes copied at once (at least the largest array); `start` then takes longer and
        uses little memory. None copies everything first.
    """

    def __init__(self, copied_bytes: int | None = None) -> None:
        # The restoring run chooses the shardings, so none are stored.
        arrays = type_handlers.ArrayHandler(array_metadata_store=None, enable_write_sharding_file=False)
        self._registry = type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._chunk_bytes, self._file_bytes = None, FILE_BYTES
        self._limits: dict[str, Any] = {}
        if copied_bytes is not None:
            self._chunk_bytes, self._file_bytes = CHUNK_BYTES, SHORT_FILE_BYTES
            gigabytes = (copied_bytes + 1) / 1e9  # Orbax requires fewer bytes than the limit
            self._limits = {"save_concurrent_gb": gigabytes, "save_device_host_concurrent_gb": gigabytes}
            # Orbax ignores the limit for prioritized arrays.
            self._limits["is_prioritized_key_fn"] = lambda path: False
        self._items: frozenset[str] = frozenset()
        self._orbax: ocp.AsyncCheckpointer | None = None

    def start(self, place: Path, tree: Mapping[str, Any]) -> None:
        """Starts writing `tree` into the new `place`; returns once its arrays are copied and may be overwritten."""
        requests = {}
        for item, inner in tree.items():
            if not jax.tree.leaves(inner):
                continue  # Orbax writes no empty trees
            arrays = {
                n: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for n, leaf in flatten(inner).items()
            }
            chunks = {name: ocp.SaveArgs(chunk_byte_size=self._chunk_bytes) for name in arrays}
            requests[item] = ocp.args.PyTreeSave(
                unflatten(arrays), unflatten(chunks), ocdbt_target_data_file_size=self._file_bytes
            )
        self._writer(requests).save(str(place), args=ocp.args.Composite(**requests))

    def _writer(self, items: Iterable[str]) -> ocp.AsyncCheckpointer:
        """Returns a writer for these items; reuses the previous one if the items are the same."""
        if self._orbax is None or self._items != frozenset(items):
            self.close()
            self._items = frozenset(items)
            handlers: dict[str, Any] = {
                item: ocp.PyTreeCheckpointHandler(type_handler_registry=self._registry, **self._limits)
                for item in self._items
            }
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        return self._orbax

    def wait(self) -> None:
        """Waits until the tree is written; raises the error of a failed write."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None


def load(
    place: Path, saved: Mapping[str, list[Any]], abstract: Mapping[str, Any], folders: Mapping[str, Path] | None = None
) -> Any:
    """Reads the arrays in `abstract`; files of other items are not opened.

    Args:
      place: the folder's name in messages.
      saved: path -> [shape, dtype name] of the stored arrays; may hold other top-level entries than `abstract`.
      abstract: {"params": tree, ...} of arrays or `jax.ShapeDtypeStruct`s with the target shardings; a leaf without one
        goes to the first local device.
      folders: folder of each item; None or empty if an earlier version wrote all items into `place`.

    Returns:
      A tree like `abstract`, of arrays.

    Raises:
      RequestError: names, shapes or dtypes differ.
    """
    expected = flatten(abstract)
    check_tree(place, {name: leaf for name, leaf in saved.items() if name.partition("/")[0] in abstract}, expected)
    if not folders:
        arrays = _read(place, expected)
    else:
        arrays = {}
        for item in abstract:
            inner = {
                name.removeprefix(f"{item}/"): leaf for name, leaf in expected.items() if name.startswith(f"{item}/")
            }
            arrays |= {f"{item}/{name}": array for name, array in _read(folders[item], inner).items()}
    return jax.tree.structure(abstract).unflatten([arrays[name] for name in expected])


def _read(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays of one folder in Orbax's format, by path."""
    if not expected:
        return {}
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or local, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in expected.items()
    }
    request = ocp.args.PyTreeRestore(item=unflatten(expected), restore_args=unflatten(arguments), partial_restore=True)
    # Each process reads by itself: process 0 also reads alone, while the others wait for what it does with the arrays.
    options = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
        return flatten(reader.restore(str(folder), args=request))


def items_of(tree: Iterable[str]) -> list[str]:
    """Returns the top-level items of a tree's paths; each is stored in its own folder."""
    return sorted({path.partition("/")[0] for path in tree})


def describe_tree(tree: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns path -> [shape, dtype name] of every array."""
    return {name: [list(np.shape(leaf)), jnp.result_type(leaf).name] for name, leaf in flatten(tree).items()}


def check_tree(place: Path, saved: Mapping[str, list[Any]], expected: Mapping[str, Any]) -> None:
    """Compares the names, shapes and dtypes of stored and expected arrays.

    Raises:
      RequestError: they differ; the message names the first differences.
    """
    problems = [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    problems += [f"{name} is not expected" for name in sorted(saved.keys() - expected.keys())]
    for name in sorted(saved.keys() & expected.keys()):
        shape, dtype = saved[name]
        leaf = expected[name]
        if tuple(shape) != tuple(leaf.shape):
            problems.append(f"{name} has shape {tuple(shape)}, expected {tuple(leaf.shape)}")
        elif dtype != leaf.dtype.name:
            problems.append(f"{name} is {dtype}, expected {leaf.dtype.name} (nothing is cast silently)")
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RequestError(f"{place}: holds another state: {', '.join(problems[:_SHOWN])}{more}")
