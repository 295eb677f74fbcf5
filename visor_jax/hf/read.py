"""Reads a model in Hugging Face's format: everything is checked first, then it streams into sharded arrays.

In: a folder with `config.json`, safetensors (one file, or shards and their index) and `tokenizer.json`: a
LLaVA-OneVision checkpoint in the hub's layout or as transformers saves it, or a folder that our own export wrote. Out:
its `Architecture`, and the parameter tree. Files are read as data; no code that lies beside them is run.

Only slices of tensors are read, those that a device is to hold, so that the host never holds a second copy of them all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path, read_json
from visor_jax.hf.config import architecture_of, image_token_of, own_fields
from visor_jax.hf.headers import MERGE, Stored, listed, locate, shown
from visor_jax.hf.hub import hint
from visor_jax.hf.keys import Entry, entries, from_torch, leaf, torch_shape
from visor_jax.hf.preprocessor import read_preprocessor
from visor_jax.hf.section import read_object
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params
from visor_jax.scale.sharding import param_shardings
from visor_jax.tree import unflatten

DTYPES = ("F32", "BF16", "F16")
KIND_FIELDS = frozenset({"model_type", "architectures", "text_config", "mm_projector_type", "mm_vision_tower"})
# What a checkpoint may hold beside the model: norms and heads whose output nobody reads, tables that are recomputed.
UNREAD = re.compile(r".*(vision_model\.(post_layernorm|head)\.|rotary_emb\.|position_ids$)")
_FINITE_BYTES = 1 << 26  # looked at in one go
_SHOWN = 3  # tensors that a message names of each kind of fault


@dataclass(frozen=True)
class Checkpoint:
    """A folder as its headers tell it.

    Attributes:
      arch: of what is stored: plan "dense" for LLaVA-OneVision, "visor" for our own exports.
      tensors: `key_map.Entry.key` -> where it lies.
      image_token_id: the token that stands for a picture.
      stage: of training that the weights come from, as our own exports tell; elsewhere "base".
      viable_budgets, has_policy, system: what our own exports add; empty, False and None elsewhere.
    """

    folder: Path
    arch: Architecture
    tensors: dict[str, Stored]
    image_token_id: int
    stage: str
    viable_budgets: list[Bits]
    has_policy: bool
    system: str | None


def is_folder(path: str | Path) -> bool:
    """Whether a folder's `config.json` is that of a model, and not that of a workdir.

    Raises:
      RequestError: there is a `config.json` and it cannot be read.
    """
    file = as_path(path) / "config.json"
    if not os.path.lexists(file):
        return os.path.lexists(file.with_name("adapter_config.json"))
    found = read_json(file)
    return isinstance(found, dict) and not KIND_FIELDS.isdisjoint(found)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the JSON files and the headers of the safetensors; no tensor is read.

    Raises:
      RequestError: a file is missing or damaged, the model is of another kind, or the sizes in `config.json` are not
        those of the tensors.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; expected one in Hugging Face's format{hint(folder)}")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise RequestError(f"{folder}: a PEFT adapter, without the model; {MERGE}")
    config = read_object(folder / "config.json")
    arch = architecture_of(config, read_preprocessor(folder), folder)
    own = own_fields(config, arch, folder)
    checkpoint = Checkpoint(folder, arch, locate(folder), image_token_of(config, folder), *own)
    _check_sizes(checkpoint)
    return checkpoint


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Compare each size that `config.json` tells with a tensor's header, before anything is computed from the sizes."""
    arch, tensors = checkpoint.arch, checkpoint.tensors
    text, vision, last = arch.text, arch.vision, arch.text.num_layers - 1
    layer, tower = "model.language_model.layers.0", "model.vision_tower.vision_model"
    expected = {
        "model.language_model.embed_tokens.weight": (text.vocab_size, text.hidden_size),
        f"{layer}.self_attn.q_proj.weight": (text.num_heads * text.head_dim, text.hidden_size),
        f"{layer}.self_attn.k_proj.weight": (text.num_kv_heads * text.head_dim, text.hidden_size),
        f"{layer}.mlp.up_proj.weight": (text.intermediate_size, text.hidden_size),
        f"model.language_model.layers.{last}.mlp.up_proj.weight": (text.intermediate_size, text.hidden_size),
        f"{tower}.embeddings.patch_embedding.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
        f"{tower}.embeddings.position_embedding.weight": (vision.patches_per_tile, vision.hidden_size),
        f"{tower}.encoder.layers.0.mlp.fc1.weight": (vision.intermediate_size, vision.hidden_size),
    }
    if arch.plan == "visor":
        cross = "model.language_model.cross_attention.0"
        expected |= {
            f"{cross}.k_proj.weight": (arch.cross.num_kv_heads * text.head_dim, text.hidden_size),
            f"{cross}.conditional_position.weight": (text.hidden_size, 1, arch.cross.kernel_size),
            "model.routing.fc1.weight": (arch.policy.hidden_size, text.hidden_size),
            "model.routing.fc2.weight": (arch.policy.max_budgets, arch.policy.hidden_size),
        }
    other = [_other_shape(tensors[key], shape) for key, shape in expected.items() if key in tensors]
    _refuse(checkpoint.folder, [], [], [problem for problem in other if problem])


def check(checkpoint: Checkpoint) -> None:
    """See that every tensor is there, of its shape, of floating point and finite, and that nothing is left over.

    Raises:
      RequestError: with what is wrong, the first few tensors of each kind by name.
    """
    arch, tensors = checkpoint.arch, checkpoint.tensors
    shapes, other = abstract_params(arch), []
    wanted = {entry.key: torch_shape(shapes, entry, arch) for entry in entries(arch)}
    missing = [key for key in wanted if key not in tensors]
    unexpected = [shown(tensors[key].name) for key in tensors if key not in wanted and not _unread(key, arch)]
    if "lm_head.weight" in missing:
        missing.remove("lm_head.weight")
        other.append(
            "lm_head.weight is missing, and config.json does not tie it to the embeddings (transformers would draw it"
            " at random); if it is tied, set tie_word_embeddings to true"
        )
    for key in wanted.keys() & tensors.keys():
        stored = tensors[key]
        if wrong := _other_shape(stored, wanted[key]):
            other.append(wrong)
        elif stored.dtype not in DTYPES:
            other.append(f"{shown(stored.name)} is {stored.dtype}, expected one of {', '.join(DTYPES)}")
        elif not _is_finite(stored):
            other.append(f"{shown(stored.name)} holds NaN or Inf")
    table = tensors.get("model.language_model.embed_tokens.weight")
    tied = tensors.get("lm_head.weight") if arch.text.tie_word_embeddings else None
    if not (missing or unexpected or other) and table is not None and tied is not None and not _same(tied, table):
        other.append(f"{tied.name} differs from the embeddings, to which config.json ties it")
    _refuse(checkpoint.folder, missing, unexpected, sorted(other))


def _other_shape(stored: Stored, expected: tuple[int, ...]) -> str:
    return "" if stored.shape == expected else f"{shown(stored.name)} has shape {stored.shape}, expected {expected}"


def _refuse(folder: Path, missing: list[str], unexpected: list[str], other: list[str]) -> None:
    """One line for all that is wrong, if anything is."""
    count = len(missing) + len(unexpected) + len(other)
    verb = {True: "is", False: "are"}
    parts = [f"{listed(missing, _SHOWN)} {verb[len(missing) == 1]} missing"] if missing else []
    parts += [f"{listed(unexpected, _SHOWN)} {verb[len(unexpected) == 1]} not expected"] if unexpected else []
    parts += [listed(other, _SHOWN)] if other else []
    if count:
        raise RequestError(f"{folder}: {count} tensors are not as config.json says: {'; '.join(parts)}")


def check_tokenizer(checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> None:
    """See that every token has its row in the embeddings, and that both mean the same token by a picture.

    Raises:
      RequestError: if not; the message names both.
    """
    rows, picture = checkpoint.arch.text.vocab_size, checkpoint.image_token_id
    if tokenizer.vocab_size > rows:
        raise RequestError(
            f"{checkpoint.folder}: text_config.vocab_size={rows}: expected at least {tokenizer.vocab_size}, as many as"
            " its tokenizer has ids"
        )
    if tokenizer.image_token_id != picture:
        raise RequestError(
            f"{checkpoint.folder}: config.json stands token {picture} for a picture, its tokenizer"
            f" {tokenizer.image_token_id}; expected the same"
        )


def _unread(key: str, arch: Architecture) -> bool:
    layer = re.search(r"vision_model\.encoder\.layers\.(\d+)\.", key)
    tied = arch.text.tie_word_embeddings and key == "lm_head.weight"
    return tied or UNREAD.match(key) is not None or (layer is not None and int(layer[1]) >= arch.vision.num_layers)


def _pieces(stored: Stored) -> Iterator[np.ndarray]:
    """A tensor in bands of rows."""
    with safe_open(stored.file, "numpy") as opened:
        view = opened.get_slice(stored.name)
        if not stored.shape:
            yield np.asarray(opened.get_tensor(stored.name))
            return
        rows = max(1, _FINITE_BYTES // max(4 * int(np.prod(stored.shape[1:])), 1))
        for start in range(0, stored.shape[0], rows):
            yield view[start : min(start + rows, stored.shape[0])]  # it refuses what is past the end


def _is_finite(stored: Stored) -> bool:
    return all(np.isfinite(piece.astype(np.float32)).all() for piece in _pieces(stored))


def _same(one: Stored, other: Stored) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(a, b) for a, b in zip(_pieces(one), _pieces(other), strict=True)
    )


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_params(checkpoint: Checkpoint, mesh: Mesh, dtype: Any = np.float32) -> Params:
    """The parameter tree of what is stored, every array in its sharding on `mesh`."""
    shapes = abstract_params(checkpoint.arch)
    places, groups = param_shardings(shapes, mesh), dict[tuple[str, ...], list[Entry]]()
    for entry in entries(checkpoint.arch):
        groups.setdefault(entry.path, []).append(entry)
    found = {}
    for path, group in groups.items():
        shape = leaf(shapes, group[0]).shape
        read = partial(_read_leaf, checkpoint, group, shape, np.dtype(dtype))
        found["/".join(path)] = jax.make_array_from_callback(shape, leaf(places, group[0]), read)
    return unflatten(found)


def _read_leaf(
    checkpoint: Checkpoint, group: list[Entry], shape: tuple[int, ...], dtype: np.dtype, where: tuple[slice, ...] | None
) -> np.ndarray:
    """The part `where` of one array of the tree, from one tensor or, where layers are stacked, from one for each."""
    where = (slice(None),) * len(shape) if where is None else where
    if group[0].index is None:
        return _read_part(checkpoint, group[0], where, dtype)
    layers = group[where[0]]
    sizes = [len(range(*part.indices(size))) for part, size in zip(where, shape, strict=True)]
    found = np.empty(sizes, dtype)
    for number, entry in enumerate(layers):
        found[number] = _read_part(checkpoint, entry, where[1:], dtype)
    return found


def _read_part(checkpoint: Checkpoint, entry: Entry, where: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A part, in the tree's coordinates, of the tensor of one entry."""
    stored = checkpoint.tensors[entry.key]
    with safe_open(stored.file, "numpy") as opened:
        if entry.layout == "transposed":
            return opened.get_slice(stored.name)[where[1], where[0]].astype(dtype).T
        if entry.layout == "same" and where:
            return opened.get_slice(stored.name)[where].astype(dtype)
        return from_torch(opened.get_tensor(stored.name).astype(dtype), entry)[where]
