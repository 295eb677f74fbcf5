"""Writes a model as a Hugging Face folder and moves it into place once the PyTorch model in it matches the JAX model.

In: a loaded model (`visor_jax.loading.Visor`) and a destination. Out: a folder with config.json, safetensors (sharded
above `max_shard_bytes`), tokenizer and preprocessor files, the PyTorch module's files, a model card and parity.json. A
VISOR plan loads through `AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)`; a dense plan is a
stock `LlavaOnevisionForConditionalGeneration`, without code, or with that of the processor if pictures are
standardized.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data import chat_template
from visor_jax.errors import RequestError, RunError, unwritable
from visor_jax.export import folder_files
from visor_jax.export.model_card import About, write_card
from visor_jax.export.parity import ExportedModel, Parity, compare
from visor_jax.files.bucket import UNFINISHED, is_bucket, names_below, uploaded_folder
from visor_jax.files.read_write import as_path, folder_beside
from visor_jax.hf import keys as key_map
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.supervision import beat

DTYPES = ("float32", "bfloat16")
MODULE_FILES = (
    "cache_visor.py",
    "chat_visor.py",
    "configuration_visor.py",
    "decoder_visor.py",
    "generation_visor.py",
    "modeling_visor.py",
    "processing_visor.py",
    "specialized_visor.py",
    "template_visor.py",
    "tiles_visor.py",
    "vision_visor.py",
)
PROCESSOR_FILES = (  # of MODULE_FILES: what the processor needs
    "chat_visor.py",
    "configuration_visor.py",
    "processing_visor.py",
    "template_visor.py",
    "tiles_visor.py",
    "vision_visor.py",
)
PROOF = "parity.json"  # of an export that agrees with the JAX model
OF_AN_EXPORT = ("config.json", PROOF)  # by which one is known; a workdir has a config.json as well
Tensors = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]  # PyTorch key -> (shape, its array, lazily)


def export(
    model: ExportedModel,
    out: str | os.PathLike[str],
    *,
    stage: str,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    about: About | None = None,
) -> dict[str, Any]:
    """Exports `model` to the folder `out`, which appears complete and verified, or not at all.

    In a bucket, `parity.json` appears last, when all other files are complete.

    Args:
      model: the model to export: parameters, architecture, tokenizer, viable budgets, system text.
      out: a folder that does not exist yet or is empty.
      stage: training stage of the weights, for the model card and parity.json.
      dtype: of the stored weights, "float32" or "bfloat16".
      max_shard_bytes: maximum size of a safetensors file, except for a single larger tensor.
      force: replace an earlier export in `out`.
      about: license, base model and more for the model card; None: weights without a base model.

    Returns:
      {"out", "max_logit_difference", "greedy_tokens_equal"}.

    Raises:
      RequestError: `out` is not empty, `dtype` is unknown, visual tokens are packed, reduced or dropped, or torch or
        transformers is not installed.
      RunError: the exported model does not match this one, or the disk is full.
    """
    if dtype not in DTYPES:
        raise RequestError(f"dtype: {dtype!r}; expected {' or '.join(DTYPES)}")
    if model.arch.anyres.packing != 1:
        raise RequestError(
            f"export: model.anyres.packing={model.arch.anyres.packing}; expected 1: the processors of transformers have"
            " no packed visual tokens"
        )
    if model.arch.reduction.method != "none":
        raise RequestError(
            f"export: model.reduction.method={model.arch.reduction.method!r}; expected 'none': the exported PyTorch"
            " module has no reductions"
        )
    if model.arch.dropping.active:
        raise RequestError(
            f"export: model.dropping.method={model.arch.dropping.method!r}; expected 'none': the exported PyTorch"
            " module reads every visual token in every layer"
        )
    place = as_path(out)
    out = place if is_bucket(place) else Path(os.path.abspath(place))
    _check_destination(out, force)
    for needed in ("torch", "transformers"):
        if importlib.util.find_spec(needed) is None:
            raise RequestError(f"export: needs {needed}; install it with: pip install 'visor_jax[torch]'")
    fingerprint = getattr(model, "fingerprint", "")
    if dtype == "bfloat16":
        model = rounded(model)
    with _temporary_folder(out) as folder:
        write_folder(folder, model, stage=stage, dtype=dtype, max_shard_bytes=max_shard_bytes)
        proof = compare(model, folder)
        record = {"stage": stage, "model": fingerprint, "dtype": dtype, "proven_with": proven_with(), **proof.as_json()}
        record["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        folder_files.write_json(folder / PROOF, record)
        if not proof.holds:
            raise RunError(f"export: {out} was not written: {proof.why_not()}")
        write_card(folder / "README.md", model, proof, about or About(), stage=stage, dtype=dtype)
    return summary(out, proof)


def proven_with() -> dict[str, str]:
    """Returns the library versions and the image backend of the comparison."""
    import PIL
    import torch
    import transformers

    versions = {"pillow": PIL.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"picture_backend": "pil", **versions}


def rounded(model: ExportedModel) -> ExportedModel:
    """Returns the model with weights rounded to bfloat16, kept in float32; a bfloat16 export is compared with it."""
    import jax
    import jax.numpy as jnp

    return model.with_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), model.params))


def summary(out: Path, proof: Parity) -> dict[str, Any]:
    """Returns the result of the export command."""
    return {
        "out": str(out),
        "max_logit_difference": proof.max_logit_difference,
        "greedy_tokens_equal": proof.greedy_tokens_equal,
    }


def write_folder(folder: Path, model: ExportedModel, *, stage: str, dtype: str, max_shard_bytes: int) -> None:
    """Writes every file that loading needs, without the comparison and the model card."""
    arch = model.arch
    files = folder_files.describe(model, stage=stage, dtype=dtype)
    for name, value in files.json_files.items():
        folder_files.write_json(folder / name, value)
    for name, text in files.text_files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tensors = visor_tensors(model.params, arch) if arch.plan == "visor" else stock_tensors(model.params, arch)
    write_safetensors(folder, tensors, dtype, max_shard_bytes)
    if folder_files.has_own_processor(arch):
        source = Path(__file__).parent / "torch_model"
        for name in MODULE_FILES if arch.plan == "visor" else PROCESSOR_FILES:
            file = Path(chat_template.__file__) if name == "template_visor.py" else source / name
            shutil.copyfile(file, folder / name)


# --- tensors ----------------------------------------------------------------------------------------------------------


def visor_tensors(params: Mapping[str, Any], arch: Architecture) -> Tensors:
    """Returns every tensor of the PyTorch module, by key."""

    def read_lazily(entry: key_map.Entry) -> Callable[[], np.ndarray]:
        return lambda: key_map.to_torch(params, entry, arch)

    return {
        entry.key: (key_map.torch_shape(params, entry, arch), read_lazily(entry)) for entry in key_map.entries(arch)
    }


def stock_tensors(params: Mapping[str, Any], arch: Architecture) -> Tensors:
    """Returns every tensor of transformers' LLaVA-OneVision, by the hub's names.

    Its tower has a final norm whose output is unused; it is written as identity.
    """
    tensors = {key_map.hub_key(key): tensor for key, tensor in visor_tensors(params, arch).items()}
    size, tower = arch.vision.hidden_size, "vision_tower.vision_model"
    norm = f"{tower}.post_layernorm"
    tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = _constant((size,), 1), _constant((size,), 0)
    return tensors


def _constant(shape: tuple[int, ...], value: float) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
    return shape, lambda: np.full(shape, value, np.float32)


def write_safetensors(folder: Path, tensors: Tensors, dtype: str, max_shard_bytes: int) -> None:
    """Writes the weights shard by shard; only one shard is in memory at a time.

    Raises:
      RunError: a weight is not finite in `dtype`.
    """
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory

    kind = getattr(torch, dtype)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: int(np.prod(tensor[0])) * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for name, keys in plan.filename_to_tensors.items():
        beat()
        fault_point("export")
        shard = {key: torch.from_numpy(tensors[key][1]()).to(kind).contiguous() for key in keys}
        for key, tensor in shard.items():
            if not torch.isfinite(tensor).all():
                raise RunError(f"export: {key} holds values that are not finite in {dtype}")
        _save(shard, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        folder_files.write_json(folder / "model.safetensors.index.json", index)


def _save(shard: dict[str, Any], file: Path) -> None:
    """Writes one file of weights with the default mode; safetensors alone would make it readable by the owner only.

    Raises:
      OSError: the file cannot be written; safetensors reports the system's error number in its message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(file)) from error


# --- destination ------------------------------------------------------------------------------------------------------


def _check_destination(out: Path, force: bool) -> None:
    """Raises RequestError unless `out` is new, empty, or an export that `force` may replace, in a writable folder."""
    if not str(out).isprintable():
        raise RequestError(f"--out={str(out)!r}: expected a path of printable characters")
    if is_bucket(out):
        _check_objects(out, force)
        return
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RequestError(f"--out={out}: is not a folder; expected a folder that is new or empty")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise RequestError(f"--out={out}: is not empty; expected a folder that is new or empty (--force replaces it)")
    if out.is_dir() and any(out.iterdir()) and not {*OF_AN_EXPORT} <= {file.name for file in out.iterdir()}:
        raise RequestError(f"--out={out}: holds something else than a model; --force replaces exports only")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(f"--out={out}: cannot be written; {parent} is not a folder that we may write to")


def _check_objects(out: Path, force: bool) -> None:
    """As `_check_destination`, in a bucket; what an interrupted export has uploaded may be replaced."""
    names = names_below(out)
    if not names or UNFINISHED in names:
        return
    if not force:
        raise RequestError(f"--out={out}: is not empty; expected a folder that is new or empty (--force replaces it)")
    if not {*OF_AN_EXPORT} <= {*names}:
        raise RequestError(f"--out={out}: holds something else than a model; --force replaces exports only")


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """Yields a new folder next to `out` (for a bucket a local one) that replaces it if the block succeeds."""
    try:
        with uploaded_folder(out, PROOF, beat) if is_bucket(out) else folder_beside(out, replace=True) as folder:
            yield folder
    except OSError as error:
        raise unwritable(f"--out={out}", error) from error
