"""Keeps what every budget shares on disk: visual tokens, and the text at the entry of the first optional layer.

Search, label, evaluate and the policy stage read the same samples several times: in each round of a search, for other
budgets, for every question about a picture. With `evaluate.cache_gigabytes` above 0 they compute the visual tokens of a
sample once and its budget-independent layers once per question, store both below `features/` in the workdir, and read
them back afterwards.

A folder `features/<digest>` belongs to the parameters, architecture, dtype, versions and platform that its content
depends on; a tensor in it has the digest of its inputs (tiles and their places; also tokens, for text) as its name. So
nothing stale is read: another stage with the same vision tower finds the visual tokens, one with another tower does
not. Files are safetensors, one per batch, without padding. When the bound is reached, the folders of other parameters
are removed first, those used longest ago before others; after that nothing more is stored, with one warning, and what
is not stored is computed each time. `features/` can be removed whenever no command runs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from visor_jax.architecture import Architecture
from visor_jax.config import Config
from visor_jax.data.candidates import candidate_arrays
from visor_jax.data.tile_pools import Arrays, tiles_of_rows, tower_inputs
from visor_jax.data.tiles import tile_shapes
from visor_jax.errors import RequestError, RunError
from visor_jax.evaluate.visual_tokens import visual_tokens
from visor_jax.files.read_write import file_beside, remove_folder
from visor_jax.model.decoder import cross_params, layer_params
from visor_jax.model.layers import Params
from visor_jax.model.visor import shared_text
from visor_jax.scale.gather import gathered
from visor_jax.scale.mesh import row_shards
from visor_jax.scale.sharding import place_batch
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import versions
from visor_jax.workdir.visible import wait_until

log = logging.getLogger(__name__)


class FeatureStore:
    """The stored tensors of a workdir, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
          folder: `features/` of a workdir.
          limit: bytes of all files below it.
        """
        self.folder, self._limit = folder, limit
        self._known: dict[str, dict[str, Path]] = {}  # file of each tensor, by the parameters' digest and its own
        self.full = False

    @classmethod
    def of(cls, config: Config, workdir: Workdir) -> FeatureStore | None:
        """Returns the store of a workdir; None if `evaluate.cache_gigabytes` is 0.

        Raises:
          RequestError: the workdir is not on a local disk.
        """
        if not config.evaluate.cache_gigabytes:
            return None
        if "://" in os.fspath(workdir.path):
            raise RequestError(
                f"evaluate.cache_gigabytes={config.evaluate.cache_gigabytes:g}: features are stored on a local disk and"
                f" the workdir is {workdir.path}; expected 0, or a local workdir"
            )
        return cls(workdir.path / "features", int(config.evaluate.cache_gigabytes * 1e9))

    def known(self, owner: str) -> Mapping[str, Path]:
        """Returns the file of every stored tensor of an owner, the digest of parameters; marks them as used now."""
        if owner not in self._known:
            tensors = self._known[owner] = dict[str, Path]()
            for path in sorted((self.folder / owner).glob("*.safetensors")):
                try:
                    with safe_open(path, framework="numpy") as file:
                        tensors.update(dict.fromkeys(file.keys(), path))
                except (SafetensorError, OSError) as error:
                    log.warning("%s: damaged, removed: %s", path, error)
                    path.unlink(missing_ok=True)
            if tensors:
                os.utime(self.folder / owner)
        return self._known[owner]

    def files(self, owner: str) -> list[str]:
        """Returns the names of the files that hold an owner's tensors."""
        return sorted({path.name for path in self.known(owner).values()})

    def refresh(self, owner: str, files: Set[str]) -> None:
        """Reads again what is stored of an owner, when these files, perhaps of other processes, are there.

        A network's file system may take some time to show them.

        Raises:
          RunError: one does not appear.
        """
        missing = sorted(files)

        def are_there() -> bool:
            missing[:] = [name for name in missing if not (self.folder / owner / name).exists()]
            return not missing

        if not wait_until(are_there):
            raise RunError(f"{self.folder / owner / missing[0]}: another process has written it, and it is not there")
        self._known.pop(owner, None)
        self.known(owner)

    def read(self, owner: str, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns those of the named tensors that are stored; a file that was removed meanwhile has none."""
        known, by_file = self.known(owner), dict[Path, list[str]]()
        for name in dict.fromkeys(names):
            if name in known:
                by_file.setdefault(known[name], []).append(name)
        found: dict[str, np.ndarray] = {}
        for path, own in by_file.items():
            try:
                with safe_open(path, framework="numpy") as file:
                    found |= {name: _restored(file.get_tensor(name)) for name in own}
            except (SafetensorError, OSError) as error:
                log.warning("%s: cannot be read, its features are computed again: %s", path, error)
                self._known[owner] = {name: other for name, other in known.items() if other != path}
        return found

    def write(self, owner: str, tensors: Mapping[str, np.ndarray]) -> bool:
        """Stores new tensors; returns whether there was room for them."""
        if not tensors:
            return True
        data = save({name: _stored(x) for name, x in tensors.items()})
        if self.full or not self._make_room(owner, len(data)):
            return False
        name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:32]
        path = self.folder / owner / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as file:
            file.write(data)
        self.known(owner)
        self._known[owner].update(dict.fromkeys(tensors, path))
        return True

    def _make_room(self, owner: str, size: int) -> bool:
        """Removes the folders of other owners, as far as needed, and returns whether `size` bytes fit."""
        while self._bytes(self.folder) + size > self._limit:
            others = [path for path in self.folder.glob("*") if path.is_dir() and path.name not in self._known]
            if not others:
                self.full = True
                log.warning(
                    "%s: evaluate.cache_gigabytes=%g is reached; what is not stored yet is computed each time",
                    self.folder,
                    self._limit / 1e9,
                )
                return False
            remove_folder(min(others, key=lambda path: path.stat().st_mtime))
        return True

    @staticmethod
    def _bytes(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))


def _stored(x: np.ndarray) -> np.ndarray:
    """Returns an array of a dtype that safetensors' NumPy reader knows; bfloat16 as its bits."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x


def _restored(x: np.ndarray) -> np.ndarray:
    return x.view(jnp.bfloat16) if x.dtype == np.uint16 else x


# --- what is stored ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def before_slots(arch: Architecture) -> Callable[..., jax.Array]:
    """Returns the compiled function that gives T at the entry of the first optional layer."""
    return jax.jit(partial(shared_text, arch=arch))


class SharedFeatures:
    """What every budget shares, for one model: computed once, then read from a store."""

    def __init__(
        self, store: FeatureStore, params: Params, arch: Architecture, mesh: Mesh, *, with_text: bool = True
    ) -> None:
        """
        Args:
          params: in the dtype of activations, on the devices of `mesh`.
          with_text: whether `text` is going to be called; needs the parameters of the layers before the first slot.
        """
        self.store, self._params, self._arch, self._mesh = store, params, arch, mesh
        self._dtype, self._size = params["image_newline"].dtype, arch.text.hidden_size
        self._visual_owner = _digest_of({name: params[name] for name in VISUAL}, arch)
        self._text_owner = _digest_of(_up_to_first_slot(params, arch), arch, self._visual_owner) if with_text else ""
        for owner in (self._visual_owner, *([self._text_owner] if with_text else [])):
            store.known(owner)  # so that neither makes room for the other

    def stored_by_all(self) -> SharedFeatures | None:
        """Returns a copy without parameters, which reads features and raises RunError where it would compute them.

        It reads what all processes have stored, so all must call it. None if the store of one of them is full.
        """
        files = self.store.files(self._visual_owner)
        everyone = gathered([b"full" if self.store.full else b"", json.dumps(files).encode("ascii")])
        if any(full for full, _ in everyone):
            return None
        self.store.refresh(self._visual_owner, {name for _, names in everyone for name in json.loads(names)})
        features = copy.copy(self)
        features._params = {}
        return features

    def of(self, arrays: Arrays) -> tuple[Float[np.ndarray, "B Nv D"], Float[np.ndarray, "B Nt D"] | None]:
        """Returns V(0) and, `with_text`, T at the entry of the first optional layer; zeros at padding.

        Args:
          arrays: a batch with one sample per row.
        """
        visual_used, text_used = ((arrays[f"{kind}_segments"] > 0).sum(axis=1) for kind in ("visual", "text"))
        tiles = tiles_of_rows(arrays, self._arch)
        pictures = [
            _visual_key(arrays, row, tiles[row], self._arch) if count else "" for row, count in enumerate(visual_used)
        ]
        inputs = {name: arrays[name] for name in (*tower_inputs(self._arch), "visual_segments")}
        visual = self._stored(self._visual, self._visual_owner, pictures, visual_used, inputs)
        if not self._text_owner:
            return visual, None
        keys = [_text_key(arrays, row, pictures[row]) if count else "" for row, count in enumerate(text_used)]
        inputs = {"visual": visual, **{name: arrays[name] for name in TEXT_INPUTS}}
        return visual, self._stored(self._shared_text, self._text_owner, keys, text_used, inputs)

    def _stored(
        self,
        program: Callable[[Arrays], jax.Array],
        owner: str,
        keys: Sequence[str],
        used: Sequence[int],
        inputs: Arrays,
    ) -> Float[np.ndarray, "B N D"]:
        """Returns a program's results for every row with a key; computes and stores those of new keys.

        Args:
          program: `_visual` or `_shared_text`.
          owner: digest of its parameters.
          keys: of each row; "" for a row without tokens.
          used: number of tokens of each row.
          inputs: of the program, by row.

        Raises:
          RunError: only stored features were to be read.
        """
        found = self.store.read(owner, [key for key in keys if key])
        first = {key: row for row, key in reversed([*enumerate(keys)]) if key and key not in found}
        if new := sorted(first.values()):
            if not self._params:
                raise RunError(f"{self.store.folder}: features were removed or damaged during training; start it again")
            missing = _in_bucket({name: x[new] for name, x in inputs.items()})
            extra = -len(missing["visual_segments"]) % row_shards(self._mesh)
            computed = np.asarray(program({name: _with_rows(x, extra) for name, x in missing.items()}))
            tensors = {keys[row]: computed[i, : used[row]] for i, row in enumerate(new)}
            self.store.write(owner, tensors)
            found |= tensors
        length = next(inputs[name] for name in ("text_tokens", "visual_segments") if name in inputs).shape[1]
        rows = np.zeros((len(keys), length, self._size), self._dtype)
        for row, key in enumerate(keys):
            if key:
                rows[row, : used[row]] = found[key]
        return rows

    def _visual(self, inputs: Arrays) -> jax.Array:
        return visual_tokens(self._params, inputs, self._arch, self._mesh)

    def _shared_text(self, inputs: Arrays) -> jax.Array:
        placed = place_batch(inputs, self._mesh)
        with jax.set_mesh(self._mesh):  # kernels split their work over it
            return before_slots(self._arch)(self._params, placed.pop("visual"), placed)


TEXT_INPUTS = ("text_tokens", "text_positions", "text_segments", "visual_positions", "visual_segments")
VISUAL = ("vision", "connector", "image_newline")  # the parameters that V(0) depends on


def _up_to_first_slot(params: Params, arch: Architecture) -> Params:
    """Returns the parameters that T at the entry of the first optional layer depends on besides those of V(0)."""
    kept = {"embed_tokens": params["embed_tokens"]}
    for index in arch.shared_layers:
        place = arch.layers[index]
        kept[f"layer_{index}"] = layer_params(params, place)
        if place.cross:
            kept[f"cross_{index}"] = cross_params(params, place)
    return kept


def _digest_of(params: Params, arch: Architecture, *others: str) -> str:
    """Returns a digest of parameters, and of what else the results of programs depend on; `others`: more digests."""
    digest = hashlib.sha256(json.dumps([versions(), jax.default_backend(), repr(arch), *others]).encode())
    for path, x in sorted(flatten(params).items()):
        digest.update(f"{path} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _visual_key(arrays: Arrays, row: int, count: int, arch: Architecture) -> str:
    """Returns the digest of a row's `count` tiles and of their places."""
    used = arrays["visual_weights"][row].any(axis=1)  # of a reduction there are more candidates than positions
    gather, weights = arrays["visual_gather"][row][used], arrays["visual_weights"][row][used]
    candidates = (arrays[name][row][used] for name in candidate_arrays(arch))
    of_tiles = (arrays[name][row][:count] for name in tile_shapes(0, arch))
    return _key(*of_tiles, *candidates, gather, weights, np.array(arrays["tiles"].shape[1]))


def _text_key(arrays: Arrays, row: int, pictures: str) -> str:
    """Returns the digest of a row's tokens and positions, and of the digest of its pictures."""
    used = arrays["text_segments"][row] > 0
    seen = arrays["visual_segments"][row] > 0
    return _key(
        np.frombuffer(pictures.encode(), np.uint8),
        arrays["text_tokens"][row][used],
        arrays["text_positions"][row][used],
        arrays["visual_positions"][row][seen],
    )


def _key(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(f"{x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()[:32]


def _in_bucket(arrays: Arrays) -> dict[str, np.ndarray]:
    """Appends rows of zeros up to a power of two, so that few programs are compiled."""
    count = len(next(iter(arrays.values())))
    return {name: _with_rows(x, 2 ** (count - 1).bit_length() - count) for name, x in arrays.items()}


def _with_rows(x: np.ndarray, extra: int) -> np.ndarray:
    return np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
