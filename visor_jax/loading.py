"""The Python interface: loads a trained model, which answers questions and reports their cost.

    import visor_jax
    model = visor_jax.load("runs/almanac_mini")
    answer = model.answer(image, "What is below Iron?")  # Answer(text, budget, flops, ...)
    for piece in model.stream(image, "Describe the picture.", temperature=0.7, seed=1):
        print(piece, end="", flush=True)

`visor_jax.generate.visor.Visor` is the loaded model; this module reads it from disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from visor_jax.budget import Bits
from visor_jax.checkpoint.restoring import restore_complete, saved_architecture
from visor_jax.config import from_dict
from visor_jax.data.from_config import make_tokenizer
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError
from visor_jax.files.bucket import is_bucket
from visor_jax.files.read_write import as_path
from visor_jax.generate.visor import Visor
from visor_jax.hf import hub
from visor_jax.hf.model import add_visor_params
from visor_jax.hf.read import check, check_tokenizer, is_folder, open_checkpoint, read_params
from visor_jax.hf.section import read_object
from visor_jax.model.keys import start_key
from visor_jax.model.layers import in_dtype
from visor_jax.model.visor import abstract_params
from visor_jax.scale.mesh import build_mesh
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable

__all__ = ["MODEL_STAGES", "Visor", "check_dtype", "load", "load_checkpoint", "load_stage", "stop_tokens"]

DTYPES = ("float32", "bfloat16", "float16")
MODEL_STAGES = (  # newest first
    "policy", "universal", "full", "dense", "warmup", "base", "base_pages", "base_lists", "base_words",
)  # fmt: skip


def load(path: str | Path, plan: str | None = None, dtype: Any = None) -> Visor:
    """Loads a model from a workdir (its newest complete stage), one stage's folder, a Hugging Face folder, or the hub.

    Args:
      path: a workdir, `WORKDIR/<stage>`, a LLaVA-OneVision checkpoint, an export of `visor export`, or, if no such
        folder exists, "almanac-base" (`visor_jax.config.shipped`) or a model's name on the Hugging Face hub, `ORG/NAME`
        or `ORG/NAME@REVISION` (`visor_jax.hf.hub`).
      plan: "dense" or "visor"; None uses the stored plan. "visor" adds new layers to a dense checkpoint, as `visor
        import` does; otherwise the plan must be the stored one.
      dtype: of the parameters; None is float32.

    Raises:
      RequestError: the path holds no model, or the model does not support the plan.
    """
    if plan not in (None, "dense", "visor"):
        raise RequestError(f"plan={plan!r}: expected 'dense' or 'visor'")
    check_dtype(dtype)
    path = as_path(hub.local_folder(path))  # a bucket's address keeps its "//"
    if is_folder(path):
        return load_checkpoint(path, plan, dtype)
    is_stage = path.name in MODEL_STAGES and not (path / "config.json").exists()  # a workdir may be called "full"
    workdir, stage = (Workdir(path.parent), path.name) if is_stage else (Workdir(path), None)
    if stage is None:
        stage = next((s for s in MODEL_STAGES if workdir.stage(s).is_complete()), None)
    if stage is None:
        problem = "no complete stage" if path.is_dir() else "no such folder"
        hint = "" if path.is_dir() else hub.hint(path)
        raise RequestError(
            f"{path}: {problem}; expected a workdir that `visor run`, `train` or `import` wrote, or a"
            f" {'local ' if is_bucket(path) else ''}folder in Hugging Face's format, with the config.json of a"
            f" model{hint}"
        )
    model = load_stage(workdir, stage, dtype)
    if plan is not None and plan != model.arch.plan:
        raise RequestError(f"plan={plan}: {path} holds a model of plan {model.arch.plan!r}")
    return model


def load_stage(workdir: Workdir, stage: str, dtype: Any = None) -> Visor:
    """Loads the model of one complete stage of a workdir."""
    config = from_dict(workdir.config())
    arch = saved_architecture(config, workdir.stage(stage))
    params = restore_complete(workdir, stage, abstract_params(arch))
    if dtype is not None:
        params = in_dtype(params, dtype)
    searched = arch.num_slots > 0 and (workdir.path / "search" / "viable.json").exists()  # a dense stage has no slots
    viable = read_viable(workdir, arch.num_slots) if searched else unsearched_budgets(arch.num_slots)
    model = Visor(
        params,
        arch,
        make_tokenizer(config),
        viable,
        system=config.tokenizer.system or None,
        has_policy=stage == "policy",
        searched=searched,
        stage=stage,
        source=str(workdir.path),
    )
    model.fingerprint = workdir.stage(stage).fingerprint()
    return model


def unsearched_budgets(num_slots: int) -> list[Bits]:
    """Returns the budgets of a model before search: none and all of its slots; one budget if it has none."""
    return list(dict.fromkeys([(False,) * num_slots, (True,) * num_slots]))


def load_checkpoint(folder: Path, plan: str | None = None, dtype: Any = None) -> Visor:
    """Loads a model from a folder in Hugging Face's format onto the first device."""
    checkpoint = open_checkpoint(folder)
    tokenizer, ends = load_tokenizer(folder), stop_tokens(folder)
    check_tokenizer(checkpoint, tokenizer)
    if plan == "dense" and checkpoint.arch.plan == "visor":
        raise RequestError(f"plan=dense: {folder} holds a model of plan 'visor'")
    check(checkpoint)
    mesh = build_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    params, arch = read_params(checkpoint, mesh, dtype or jnp.float32), checkpoint.arch
    viable = checkpoint.viable_budgets
    if plan == "visor" and arch.plan == "dense":
        arch = dataclasses.replace(arch, plan="visor")
        params, _ = add_visor_params(params, arch, mesh, start_key(0, "base"))
        viable = unsearched_budgets(arch.num_slots)
    return Visor(
        params,
        arch,
        tokenizer,
        viable,
        system=checkpoint.system,
        has_policy=checkpoint.has_policy,
        searched=bool(checkpoint.viable_budgets),
        stage=checkpoint.stage,
        stop_token_ids=ends,
        source=str(folder),
    )


def check_dtype(dtype: Any) -> None:
    """Raises RequestError unless `dtype` is None, a name in `DTYPES`, or converts to one of them in JAX."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise RequestError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}")


def stop_tokens(folder: Path) -> list[int]:
    """Returns the `eos_token_id`s of a checkpoint's `generation_config.json`, which end answers in transformers too."""
    file = folder / "generation_config.json"
    if not file.exists():
        return []
    value = read_object(file).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise RequestError(f"{file}: eos_token_id={str(value)[:80]}: expected a token id or a list of them")
    return ids
