"""Maps the parameter tree to the keys of a PyTorch checkpoint and back, with one table for both directions.

In: an `Architecture`. Out: one `Entry` per PyTorch tensor with its path in the tree (and the index of a stacked layer)
and its layout. `to_torch` and `from_torch` convert one tensor at a time, so that a large model is never copied whole.

Keys are those of transformers' `LlavaOnevisionForConditionalGeneration` in memory, where they exist
(`model.language_model.layers.N...`), with SigLIP's under `vision_model`. `hub_key` returns the names in files on the
hub (`language_model.model.layers.N...`), and `canonical_key` normalizes every known spelling.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from visor_jax.architecture import Architecture

QWEN2_LAYER = (  # (path in the tree, key in PyTorch, layout)
    ("input_layernorm/scale", "input_layernorm.weight", "same"),
    ("post_attention_layernorm/scale", "post_attention_layernorm.weight", "same"),
    *(
        (f"self_attn/{name}/kernel", f"self_attn.{name}.weight", "transposed")
        for name in ("q_proj", "k_proj", "v_proj")
    ),
    *((f"self_attn/{name}/bias", f"self_attn.{name}.bias", "same") for name in ("q_proj", "k_proj", "v_proj")),
    ("self_attn/o_proj/kernel", "self_attn.o_proj.weight", "transposed"),
    *((f"mlp/{name}/kernel", f"mlp.{name}.weight", "transposed") for name in ("gate_proj", "up_proj", "down_proj")),
)
CROSS_ATTENTION = (
    *((f"{name}/scale", f"{name}.weight", "same") for name in ("text_norm", "visual_norm")),
    *((f"{name}/kernel", f"{name}.weight", "transposed") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *((f"{name}/bias", f"{name}.bias", "same") for name in ("q_proj", "k_proj", "v_proj")),
    ("gate", "gate", "same"),
    ("conditional_position/kernel", "conditional_position.weight", "taps"),
)
SIGLIP_LAYER = (
    *(
        (f"self_attn/{name}/kernel", f"self_attn.{name}.weight", "transposed")
        for name in ("q_proj", "k_proj", "v_proj")
    ),
    *((f"self_attn/{name}/bias", f"self_attn.{name}.bias", "same") for name in ("q_proj", "k_proj", "v_proj")),
    ("self_attn/out_proj/kernel", "self_attn.out_proj.weight", "transposed"),
    ("self_attn/out_proj/bias", "self_attn.out_proj.bias", "same"),
    ("layer_norm1/scale", "layer_norm1.weight", "same"),
    ("layer_norm1/bias", "layer_norm1.bias", "same"),
    ("layer_norm2/scale", "layer_norm2.weight", "same"),
    ("layer_norm2/bias", "layer_norm2.bias", "same"),
    *((f"mlp/{name}/kernel", f"mlp.{name}.weight", "transposed") for name in ("fc1", "fc2")),
    *((f"mlp/{name}/bias", f"mlp.{name}.bias", "same") for name in ("fc1", "fc2")),
)


@dataclass(frozen=True)
class Entry:
    """One PyTorch tensor and its counterpart in the parameter tree.

    Attributes:
      key: in PyTorch.
      path: in the tree.
      index: of the stacked layer, or None.
      layout: tree -> PyTorch: "same"; "transposed" ([in, out] -> [out, in]); "patches" ([row * column * channel, out]
        -> convolution [out, channel, row, column]); "taps" ([taps, D] -> depthwise convolution [D, 1, taps]).
    """

    key: str
    path: tuple[str, ...]
    index: int | None = None
    layout: str = "same"


def entries(architecture: Architecture) -> list[Entry]:
    """Returns every tensor of a model, in the order of a forward pass."""
    tower = "model.vision_tower.vision_model"
    tensors = [
        _entry(f"{tower}.embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", layout="patches"),
        _entry(f"{tower}.embeddings.patch_embedding.bias", "vision/patch_embedding/bias"),
        _entry(f"{tower}.embeddings.position_embedding.weight", "vision/position_embedding/embedding"),
    ]
    for layer in range(architecture.vision.num_layers):
        tensors += _stacked(SIGLIP_LAYER, f"{tower}.encoder.layers.{layer}", "vision/layers", layer)
    for name in ("linear_1", "linear_2"):
        tensors.append(
            _entry(f"model.multi_modal_projector.{name}.weight", f"connector/{name}/kernel", layout="transposed")
        )
        tensors.append(_entry(f"model.multi_modal_projector.{name}.bias", f"connector/{name}/bias"))
    tensors.append(_entry("model.image_newline", "image_newline"))
    tensors.append(_entry("model.language_model.embed_tokens.weight", "embed_tokens/embedding"))
    tensors += _decoder_entries(architecture)
    tensors.append(_entry("model.language_model.norm.weight", "norm/scale"))
    if architecture.plan == "visor":
        tensors += _routing_entries()
    if not architecture.text.tie_word_embeddings:
        tensors.append(_entry("lm_head.weight", "lm_head/kernel", layout="transposed"))
    return tensors


def _decoder_entries(architecture: Architecture) -> Iterator[Entry]:
    crosses = itertools.count()
    for layer, place in enumerate(architecture.layers):
        yield from _stacked(QWEN2_LAYER, f"model.language_model.layers.{layer}", place.path, place.index)
        if place.cross and architecture.plan == "visor":
            prefix = f"model.language_model.cross_attention.{next(crosses)}"
            yield from _stacked(CROSS_ATTENTION, prefix, place.cross, place.index)


def _routing_entries() -> Iterator[Entry]:
    yield _entry("model.routing.token", "routing/token")
    yield _entry("model.routing.norm.weight", "routing/norm/scale")
    for name in ("fc1", "fc2"):
        yield _entry(f"model.routing.{name}.weight", f"routing/{name}/kernel", layout="transposed")
        yield _entry(f"model.routing.{name}.bias", f"routing/{name}/bias")


def _entry(key: str, path: str, index: int | None = None, layout: str = "same") -> Entry:
    return Entry(key, tuple(path.split("/")), index, layout)


def _stacked(table: tuple[tuple[str, str, str], ...], key: str, path: str, index: int) -> Iterator[Entry]:
    for own_path, own_key, layout in table:
        yield _entry(f"{key}.{own_key}", f"{path}/{own_path}", index, layout)


# --- tensors ----------------------------------------------------------------------------------------------------------


def leaf(params: Mapping[str, Any], entry: Entry) -> Any:
    """Returns the entry's array in the parameter tree; layers remain stacked.

    Raises:
      KeyError: the tree has no such path.
    """
    node: Any = params
    for name in entry.path:
        node = node[name]
    return node


def torch_shape(params: Mapping[str, Any], entry: Entry, architecture: Architecture) -> tuple[int, ...]:
    """Returns the tensor's shape in PyTorch, from a tree of arrays or of `ShapeDtypeStruct`s."""
    shape = tuple(leaf(params, entry).shape[0 if entry.index is None else 1 :])
    if entry.layout == "transposed":
        return shape[::-1]
    if entry.layout == "taps":
        return (shape[1], 1, shape[0])
    if entry.layout == "patches":
        size = architecture.vision.patch_size
        return (shape[1], 3, size, size)
    return shape


def to_torch(params: Mapping[str, Any], entry: Entry, architecture: Architecture) -> np.ndarray:
    """Returns the tensor in PyTorch's layout, as a contiguous float32 array."""
    array = leaf(params, entry)
    array = np.asarray(array if entry.index is None else array[entry.index]).astype(np.float32)
    if entry.layout == "transposed":
        array = array.T
    elif entry.layout == "taps":
        array = array.T[:, None]
    elif entry.layout == "patches":
        size = architecture.vision.patch_size
        array = array.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)
    return np.asarray(array, order="C")


def from_torch(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns one layer's array in the tree's layout; the inverse of `to_torch`, without stacking."""
    if entry.layout == "transposed":
        array = array.T
    elif entry.layout == "taps":
        array = array[:, 0].T
    elif entry.layout == "patches":
        array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return np.asarray(array, order="C")


# --- spellings --------------------------------------------------------------------------------------------------------


def hub_key(key: str) -> str:
    """Returns the name on the hub of a key that LLaVA-OneVision has too."""
    key = key.removeprefix("model.")
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    return re.sub(r"^language_model\.", "language_model.model.", key)


_WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"  # torch.compile, FSDP, recomputation


def unwrapped(key: str) -> str:
    """Removes the names that PyTorch's wrappers add to a tensor's key.

    DistributedDataParallel and DeepSpeed prepend `module.`, PEFT `base_model.model.`; torch.compile, FSDP and
    activation checkpointing also wrap submodules.
    """
    key = re.sub(rf"(?<![^.])(?:{_WRAPPERS})\.", "", key)
    return re.sub(r"^(?:module\.)*(?:base_model\.model\.)?(?:module\.)*", "", key)


def canonical_key(key: str) -> str:
    """Returns the `Entry.key` of a tensor written by any version of transformers, in the hub or in-memory layout.

    Removes the names of wrappers (`unwrapped`).
    """
    key = unwrapped(key)
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    if key.startswith("lm_head."):
        return key
    key = re.sub(r"^language_model\.model\.", "language_model.", key.removeprefix("model."))
    key = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)
    return f"model.{key}"
