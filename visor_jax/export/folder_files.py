"""Builds the small files of an exported folder: configuration, preprocessor, tokenizer, chat template.

In: a model. Out: file names and contents. All of them are derived from the architecture and the tokenizer that the
model was trained with; nothing is copied from the base model's folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.data import chat_template
from visor_jax.export.parity import ExportedModel
from visor_jax.hf.config import PROCESSOR, write_config
from visor_jax.hf.preprocessor import write_preprocessor


@dataclass(frozen=True)
class Files:
    """Contents by file name."""

    json_files: dict[str, Any]
    text_files: dict[str, str]


def describe(model: ExportedModel, *, stage: str, dtype: str) -> Files:
    """Builds every file except weights, code, model card and parity.json."""
    arch, tokenizer = model.arch, model.tokenizer
    template = chat_template.write_jinja(json.dumps(model.system or "", ensure_ascii=False))
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.end_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": [tokenizer.image_token_id],  # a placeholder in an answer would ask for a picture
    }
    return Files(
        {
            "config.json": write_config(
                arch,
                image_token_id=tokenizer.image_token_id,
                system=model.system,
                viable_budgets=model.viable_budgets,
                has_policy=model.has_policy,
                stage=stage,
                dtype=dtype,
            ),
            "generation_config.json": generation,
            "preprocessor_config.json": {**write_preprocessor(arch), **processor_class(arch)},
            "processor_config.json": {**processor_config(arch), **processor_class(arch)},
            "tokenizer_config.json": {
                **tokenizer_config(arch),
                "processor_class": processor_class(arch)["processor_class"],
            },
        },
        {"tokenizer.json": tokenizer.text, "chat_template.jinja": template},
    )


def processor_class(arch: Architecture) -> dict[str, Any]:
    """Returns the processor class for AutoProcessor: ours (remote code) where transformers' cannot serve, else that.

    Transformers' processor cannot standardize pictures, and knows no VISOR plan.
    """
    if not has_own_processor(arch):
        return {"processor_class": "LlavaOnevisionProcessor"}
    return {"processor_class": "VisorProcessor", "auto_map": {"AutoProcessor": PROCESSOR}}


def has_own_processor(arch: Architecture) -> bool:
    """Returns whether an export needs VisorProcessor, and so files with code."""
    return arch.plan != "dense" or arch.anyres.standardize


def processor_config(arch: Architecture) -> dict[str, Any]:
    """Returns the fields of processor_config.json except the class."""
    return {
        "image_token": chat_template.IMAGE_MARKER,
        "num_image_tokens": arch.vision.patches_per_tile,
        "vision_aspect_ratio": f"anyres_max_{arch.anyres.max_tiles}",
        "vision_feature_select_strategy": "full",
    }


def tokenizer_config(arch: Architecture) -> dict[str, Any]:
    """Returns the fields of tokenizer_config.json except the processor class."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": chat_template.END,
        "image_token": chat_template.IMAGE_MARKER,
        "model_max_length": arch.text.max_positions,
        "pad_token": chat_template.PAD,
        "padding_side": "left",
    }


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as sorted, indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
