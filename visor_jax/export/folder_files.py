"""The small files of an exported folder: configuration, preprocessor, tokenizer, chat template.

In: a model. Out: names and contents. Everything is written from the architecture and the
tokenizer that the model was trained with; nothing is copied from a folder of someone else's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.export.parity import ExportedModel

# What torch_model/chat_visor.py does, for tools that render templates. Pictures come first, one a line, unless the text
# says by <image> where they stand; a single one comes first in any case. SYSTEM is the trained system turn's text.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and SYSTEM -%}
{{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- endfor -%}
{%- if '<image>' not in turn.text -%}
{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
{%- set turn.text = '<image>\\n' + turn.text -%}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{%- if message['role'] == 'user' and turn.text.count('<image>') == 1 -%}
{%- set turn.text = ('<image>\\n' + turn.text.replace('<image>', '').strip()).strip() -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{%- set turn.text = turn.text.strip() -%}{%- endif -%}
{%- if message['role'] != 'system' or turn.text -%}
{{- '<|im_start|>' + message['role'] + '\\n' + turn.text + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


GENERATING, PROCESSOR = "modeling_visor.VisorForConditionalGeneration", "processing_visor.VisorProcessor"


@dataclass(frozen=True)
class Files:
    json_files: dict[str, Any]
    text_files: dict[str, str]


def describe(model: ExportedModel, *, stage: str, dtype: str) -> Files:
    """Every file but weights, code, model card and proof."""
    arch, tokenizer = model.arch, model.tokenizer
    template = CHAT_TEMPLATE.replace("SYSTEM", json.dumps(model.system or "", ensure_ascii=False))
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.end_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": [tokenizer.image_token_id],  # a placeholder in an answer would ask for a picture
    }
    return Files(
        {
            "config.json": model_config(model, stage=stage, dtype=dtype),
            "generation_config.json": generation,
            "preprocessor_config.json": {**preprocessor_config(arch), **processor_class(arch)},
            "processor_config.json": {**processor_config(arch), **processor_class(arch)},
            "tokenizer_config.json": {
                **tokenizer_config(arch),
                "processor_class": processor_class(arch)["processor_class"],
            },
        },
        {"tokenizer.json": tokenizer.text, "chat_template.jinja": template},
    )


def model_config(model: ExportedModel, *, stage: str, dtype: str) -> dict[str, Any]:
    """config.json: LLaVA-OneVision's fields, and for a VISOR plan our own."""
    arch = model.arch
    shared = {
        "dtype": dtype,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in arch.anyres.pinpoints],
        "image_token_index": model.tokenizer.image_token_id,
        "system_prompt": model.system,
        "text_config": text_config(arch),
        "tie_word_embeddings": arch.text.tie_word_embeddings,
        "training_stage": stage,
        "vision_aspect_ratio": f"anyres_max_{arch.anyres.max_tiles}",
        "vision_config": vision_config(arch),
    }
    if arch.plan == "dense":
        return {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            **shared,
        }
    return {
        "architectures": ["VisorForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_visor.VisorConfig",
            "AutoModel": GENERATING,  # tools that know no image-text-to-text class take this one, and call generate()
            "AutoModelForImageTextToText": GENERATING,
            "AutoProcessor": PROCESSOR,
        },
        "bidirectional_vision": arch.bidirectional_vision,
        "cross_kernel_size": arch.cross.kernel_size,
        "cross_num_key_value_heads": arch.cross.num_kv_heads,
        "has_policy": model.has_policy,
        "model_type": "visor",
        "patch_local": arch.vision.patch_local,
        "plan": arch.plan,
        "policy_hidden_size": arch.policy.hidden_size,
        "policy_max_budgets": arch.policy.max_budgets,
        "viable_budgets": ["0b" + "".join("01"[bit] for bit in bits) for bits in model.viable_budgets],
        **shared,
    }


def text_config(arch: Architecture) -> dict[str, Any]:
    text = arch.text
    return {
        "model_type": "qwen2",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_positions,
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def vision_config(arch: Architecture) -> dict[str, Any]:
    vision = arch.vision
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.tile_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layer_norm_eps,
        "vision_use_head": False,
    }


def preprocessor_config(arch: Architecture) -> dict[str, Any]:
    """For transformers' LlavaOnevisionImageProcessor (and its PIL twin), and for our own VisorProcessor."""
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in arch.anyres.pinpoints],
        "image_mean": list(arch.anyres.image_mean),
        "image_std": list(arch.anyres.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": arch.vision.tile_size, "width": arch.vision.tile_size},
    }


def processor_class(arch: Architecture) -> dict[str, Any]:
    """What AutoProcessor takes: our own class for a VISOR plan, by remote code; transformers' for a dense one."""
    if arch.plan == "dense":
        return {"processor_class": "LlavaOnevisionProcessor"}
    return {"processor_class": "VisorProcessor", "auto_map": {"AutoProcessor": PROCESSOR}}


def processor_config(arch: Architecture) -> dict[str, Any]:
    return {
        "image_token": "<image>",
        "num_image_tokens": arch.vision.patches_per_tile,
        "vision_aspect_ratio": f"anyres_max_{arch.anyres.max_tiles}",
        "vision_feature_select_strategy": "full",
    }


def tokenizer_config(arch: Architecture) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "image_token": "<image>",
        "model_max_length": arch.text.max_positions,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
