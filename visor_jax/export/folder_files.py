"""The small files of an exported folder: configuration, preprocessor, tokenizer, chat template, model card.

In: a model and, for the card, the proof. Out: names and contents. Everything is written from the architecture and the
tokenizer that the model was trained with; nothing is copied from a folder of someone else's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.budget import budget_name, decoder_flops, dense_decoder_flops
from visor_jax.data.anyres import visual_token_count
from visor_jax.export.parity import NEW_TOKENS, ExportedModel, Parity

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and SYSTEM -%}
{{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list -%}
{%- for picture in pictures -%}{{- '<image>' -}}{%- endfor -%}
{%- if pictures -%}{{- '\\n' -}}{%- endif -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


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
            "preprocessor_config.json": preprocessor_config(arch),
            "processor_config.json": processor_config(arch),
            "tokenizer_config.json": tokenizer_config(arch),
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
            "AutoModelForImageTextToText": "modeling_visor.VisorForConditionalGeneration",
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
        "processor_class": "LlavaOnevisionProcessor",
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


def processor_config(arch: Architecture) -> dict[str, Any]:
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "num_image_tokens": arch.vision.patches_per_tile,
        "vision_aspect_ratio": f"anyres_max_{arch.anyres.max_tiles}",
        "vision_feature_select_strategy": "full",
    }


def tokenizer_config(arch: Architecture) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaOnevisionProcessor",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "image_token": "<image>",
        "model_max_length": arch.text.max_positions,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


# --- the model card ---------------------------------------------------------------------------------------------------

HEADER = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
{tags}
---

# {title}

"""
VISOR_CARD = """\
A LLaVA-OneVision style vision-language model that looks on request (VISOR, arXiv 2603.23495): its decoder keeps every
visual token, but only few layers touch them, and for each question a policy decides how many. Exported by visor_jax
after training stage `{stage}`, weights in {dtype}.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True).eval()
processor = get_class_from_dynamic_module("processing_visor.VisorProcessor", DIR).from_pretrained(DIR)
inputs = processor(Image.open("photo.png"), "Which digit is below the letter A?")
tokens = model.generate(**inputs, budget="{default}", max_new_tokens=32)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:]))
```

This runs the Python files of this folder (torch and transformers 5.3 or newer are all they need). Without remote code,
from an installation of visor_jax:

```python
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor

model = VisorForConditionalGeneration.from_pretrained(DIR).eval()
processor = VisorProcessor.from_pretrained(DIR)
```

Inputs are those of transformers' LLaVA-OneVision (`input_ids` with one `<image>` id for each visual token,
`pixel_values`, `image_sizes`, `batch_num_images`, `attention_mask`, `labels`) and `budget`:

- `"auto"`: the policy decides for each prompt{auto}; `dial=` above 0 makes it dearer, below 0 cheaper;
- `"full"`, `"empty"`, or `"0b101"`: one bit for each of the {num_slots} slots, leftmost first;
- `"3"`: the best viable budget with three slots on;
- a list with one of these for each prompt.

`model.route(**inputs)` gives the policy's probabilities over the viable budgets.

## Budgets

Decoder GFLOPs for a prompt of {num_visual} visual and {num_text} text tokens, by formula (causal attention at half, the
vision tower not counted). A dense decoder of this size takes {dense:.4g}.

| budget | slots on | decoder GFLOPs | cheaper than dense |
| --- | --- | --- | --- |
{rows}

"""
DENSE_CARD = """\
A LLaVA-OneVision model (stock `LlavaOnevisionForConditionalGeneration`, no remote code), exported by visor_jax after
training stage `{stage}`, weights in {dtype}.

```python
from transformers import LlavaOnevisionForConditionalGeneration

model = LlavaOnevisionForConditionalGeneration.from_pretrained(DIR)
```

"""
NO_GRIDS = """\
**Pictures are never cut into tiles here** (`image_grid_pinpoints` is empty). transformers cuts the picture of every
prompt that has only one, unless `batch_num_images` counts it with others: give prompts in pairs with
`batch_num_images=[2]`, one tile `[3, S, S]` for each picture.

"""
PROOF = """\
## Agreement with the JAX model

Measured while exporting, on this folder as loaded back (`parity.json`): logits differ by at most
{difference:.2g} (allowed {bound:g}) and {new_tokens} greedy tokens are {equal}, over {comparisons} pairs of prompt and
budget{auto}. Both were computed in float64{rounded}; in float32, rounding alone makes {float32:.2g} of difference.
"""


def write_card(path: Path, model: ExportedModel, proof: Parity, *, stage: str, dtype: str) -> None:
    """README.md: what this is, how to load it, what a budget costs, and how well it agrees."""
    arch = model.arch
    visor = arch.plan == "visor"
    tags = "\n".join(f"- {tag}" for tag in (["visor", "custom_code"] if visor else ["llava_onevision"]))
    text = HEADER.format(tags=tags, title="VISOR" if visor else "LLaVA-OneVision, dense")
    shared = {"stage": stage, "dtype": dtype}
    if visor:
        default, auto = (
            ("auto", " (the default)") if model.has_policy else ("full", " (not here: it was not trained yet)")
        )
        text += VISOR_CARD.format(**shared, default=default, auto=auto, num_slots=arch.num_slots, **_costs(model))
    else:
        text += DENSE_CARD.format(**shared)
        text += "" if arch.anyres.pinpoints else NO_GRIDS
    text += PROOF.format(
        difference=proof.max_logit_difference,
        float32=proof.float32_logit_difference,
        bound=proof.bound,
        new_tokens=NEW_TOKENS,
        equal="equal" if proof.greedy_tokens_equal else "not equal",
        comparisons=len(proof.comparisons),
        auto=", `auto` with its routes among them" if visor and model.has_policy else "",
        rounded=" from the weights as rounded" if dtype == "bfloat16" else "",
    )
    path.write_text(text, encoding="utf-8")


def _costs(model: ExportedModel, num_text: int = 60) -> dict[str, Any]:
    """The table of budgets, for one picture of a tile's size."""
    arch = model.arch
    num_visual = visual_token_count((arch.vision.tile_size, arch.vision.tile_size), arch)
    dense = dense_decoder_flops(arch, num_visual, num_text)
    rows = []
    for bits in model.viable_budgets:
        flops = decoder_flops(arch, bits, num_visual, num_text)
        rows.append(f"| `{budget_name(bits)}` | {sum(bits)} | {flops / 1e9:.4g} | {dense / flops:.1f}x |")
    return {"rows": "\n".join(rows), "dense": dense / 1e9, "num_visual": num_visual, "num_text": num_text}
