"""Reads a model in Hugging Face's format: validates everything first, then streams it into sharded arrays.

In: a folder with `config.json`, safetensors (one file, or shards and their index) and `tokenizer.json`: a
LLaVA-OneVision checkpoint in the hub's layout or as transformers saves it, or a folder that our export wrote. Out: its
`Architecture` and the parameter tree. Files are read as data; no code in the folder is run.

Each device reads only the slices that it holds, so the host never keeps a second copy of all weights.
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
from visor_jax.hf.config import image_token_of, own_fields
from visor_jax.hf.folder import read_shape
from visor_jax.hf.headers import Stored, listed, locate, shown
from visor_jax.hf.keys import Entry, entries, from_torch, leaf, torch_shape
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params
from visor_jax.scale.sharding import param_shardings
from visor_jax.tree import unflatten

DTYPES = ("F32", "BF16", "F16")
KIND_FIELDS = frozenset({"model_type", "architectures", "text_config", "mm_projector_type", "mm_vision_tower"})
# Tensors that a checkpoint may hold and the model does not use: unused norms and heads, tables that are recomputed.
UNREAD = re.compile(r".*(vision_model\.(post_layernorm|head)\.|rotary_emb\.|position_ids$)")
_FINITE_BYTES = 1 << 26  # checked at a time
_SHOWN = 3  # tensors that a message names per kind of problem


@dataclass(frozen=True)
class Checkpoint:
    """A folder's configuration and tensor headers.

    Attributes:
      folder: the folder.
      arch: the stored model's: plan "dense" for LLaVA-OneVision, "visor" for our exports.
      tensors: location of each tensor, by `keys.Entry.key`.
      image_token_id: the placeholder token of a picture.
      stage: training stage of the weights, as our exports record it; otherwise "base".
      viable_budgets, has_policy, system: recorded by our exports; otherwise empty, False and None.
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
    """Returns whether a folder holds a model in Hugging Face's format, by its `config.json`; a workdir does not.

    Raises:
      RequestError: `config.json` exists and cannot be read.
    """
    file = as_path(path) / "config.json"
    if not os.path.lexists(file):
        return os.path.lexists(file.with_name("adapter_config.json"))
    config = read_json(file)
    return isinstance(config, dict) and not KIND_FIELDS.isdisjoint(config)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the JSON files and the headers of the safetensors; no tensor is read.

    Raises:
      RequestError: a file is missing or damaged, the kind of model is not supported, or the sizes in `config.json`
        differ from those of the tensors.
    """
    folder = as_path(folder)
    config, arch = read_shape(folder)
    fields = own_fields(config, arch, folder)
    checkpoint = Checkpoint(folder, arch, locate(folder), image_token_of(config, folder), *fields)
    _check_sizes(checkpoint)
    return checkpoint


# --- validation -------------------------------------------------------------------------------------------------------


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Compares each size in `config.json` with a tensor's header, before anything is computed from the sizes."""
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
    other = [_shape_problem(tensors[key], shape) for key, shape in expected.items() if key in tensors]
    _refuse(checkpoint.folder, [], [], [problem for problem in other if problem])


def check(checkpoint: Checkpoint) -> None:
    """Checks names, shapes, floating-point dtypes and finiteness of all tensors, and that no others exist.

    Raises:
      RequestError: a tensor is wrong, missing or unexpected; the message names the first few of each kind.
    """
    arch, tensors = checkpoint.arch, checkpoint.tensors
    shapes, other = abstract_params(arch), []
    expected = {entry.key: torch_shape(shapes, entry, arch) for entry in entries(arch)}
    missing = [key for key in expected if key not in tensors]
    unexpected = [shown(tensors[key].name) for key in tensors if key not in expected and not _is_unread(key, arch)]
    if "lm_head.weight" in missing:
        missing.remove("lm_head.weight")
        other.append(
            "lm_head.weight is missing, and config.json does not tie it to the embeddings (transformers would draw it"
            " at random); if it is tied, set tie_word_embeddings to true"
        )
    for key in expected.keys() & tensors.keys():
        stored = tensors[key]
        if problem := _shape_problem(stored, expected[key]):
            other.append(problem)
        elif stored.dtype not in DTYPES:
            other.append(f"{shown(stored.name)} is {stored.dtype}, expected one of {', '.join(DTYPES)}")
        elif not _is_finite(stored):
            other.append(f"{shown(stored.name)} holds NaN or Inf")
    table = tensors.get("model.language_model.embed_tokens.weight")
    tied = tensors.get("lm_head.weight") if arch.text.tie_word_embeddings else None
    if not (missing or unexpected or other) and table is not None and tied is not None and not _equal(tied, table):
        other.append(f"{tied.name} differs from the embeddings, to which config.json ties it")
    _refuse(checkpoint.folder, missing, unexpected, sorted(other))


def _shape_problem(stored: Stored, expected: tuple[int, ...]) -> str:
    return "" if stored.shape == expected else f"{shown(stored.name)} has shape {stored.shape}, expected {expected}"


def _refuse(folder: Path, missing: list[str], unexpected: list[str], other: list[str]) -> None:
    """Raises one RequestError for all problems, if there are any."""
    count = len(missing) + len(unexpected) + len(other)
    verb = {True: "is", False: "are"}
    parts = [f"{listed(missing, _SHOWN)} {verb[len(missing) == 1]} missing"] if missing else []
    parts += [f"{listed(unexpected, _SHOWN)} {verb[len(unexpected) == 1]} not expected"] if unexpected else []
    parts += [listed(other, _SHOWN)] if other else []
    if count:
        raise RequestError(f"{folder}: {count} tensors are not as config.json says: {'; '.join(parts)}")


def check_tokenizer(checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> None:
    """Checks that every token has a row in the embeddings, and that both agree on the picture's placeholder token.

    Raises:
      RequestError: one of them does not hold; the message names both values.
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


def _is_unread(key: str, arch: Architecture) -> bool:
    """Returns whether a tensor may exist that the model does not use."""
    layer = re.search(r"vision_model\.encoder\.layers\.(\d+)\.", key)
    tied = arch.text.tie_word_embeddings and key == "lm_head.weight"
    return tied or UNREAD.match(key) is not None or (layer is not None and int(layer[1]) >= arch.vision.num_layers)


def _pieces(stored: Stored) -> Iterator[np.ndarray]:
    """Yields a tensor in blocks of rows, up to `_FINITE_BYTES` each."""
    with safe_open(stored.file, "numpy") as opened:
        view = opened.get_slice(stored.name)
        if not stored.shape:
            yield np.asarray(opened.get_tensor(stored.name))
            return
        rows = max(1, _FINITE_BYTES // max(4 * int(np.prod(stored.shape[1:])), 1))
        for start in range(0, stored.shape[0], rows):
            yield view[start : min(start + rows, stored.shape[0])]  # safetensors rejects a slice past the end


def _is_finite(stored: Stored) -> bool:
    return all(np.isfinite(piece.astype(np.float32)).all() for piece in _pieces(stored))


def _equal(first: Stored, second: Stored) -> bool:
    return first.shape == second.shape and all(
        np.array_equal(a, b) for a, b in zip(_pieces(first), _pieces(second), strict=True)
    )


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_params(checkpoint: Checkpoint, mesh: Mesh, dtype: Any = np.float32) -> Params:
    """Reads the stored parameters as a tree, every array in its sharding on `mesh` and of `dtype`."""
    shapes = abstract_params(checkpoint.arch)
    shardings, groups = param_shardings(shapes, mesh), dict[tuple[str, ...], list[Entry]]()
    for entry in entries(checkpoint.arch):
        groups.setdefault(entry.path, []).append(entry)
    arrays = {}
    for path, group in groups.items():
        shape = leaf(shapes, group[0]).shape
        read = partial(_read_leaf, checkpoint, group, shape, np.dtype(dtype))
        arrays["/".join(path)] = jax.make_array_from_callback(shape, leaf(shardings, group[0]), read)
    return unflatten(arrays)


def _read_leaf(
    checkpoint: Checkpoint, group: list[Entry], shape: tuple[int, ...], dtype: np.dtype, where: tuple[slice, ...] | None
) -> np.ndarray:
    """Reads the slice `where` of one array of the tree: from one tensor, or from one per layer for stacked layers."""
    where = (slice(None),) * len(shape) if where is None else where
    if group[0].index is None:
        return _read_part(checkpoint, group[0], where, dtype)
    layers = group[where[0]]
    sizes = [len(range(*part.indices(size))) for part, size in zip(where, shape, strict=True)]
    stacked = np.empty(sizes, dtype)
    for number, entry in enumerate(layers):
        stacked[number] = _read_part(checkpoint, entry, where[1:], dtype)
    return stacked


def _read_part(checkpoint: Checkpoint, entry: Entry, where: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """Reads the slice `where`, in the tree's coordinates, of the tensor of one entry."""
    stored = checkpoint.tensors[entry.key]
    with safe_open(stored.file, "numpy") as opened:
        if entry.layout == "transposed":
            return opened.get_slice(stored.name)[where[1], where[0]].astype(dtype).T
        if entry.layout == "same" and where:
            return opened.get_slice(stored.name)[where].astype(dtype)
        return from_torch(opened.get_tensor(stored.name).astype(dtype), entry)[where]
