"""Reads and validates `config.json` in Hugging Face's format, and writes it for exports.

In: a folder in Hugging Face's format. Out: its `Architecture` and the fields that our exports add; and back. A value of
a wrong type, out of range, or not supported by this model is a `RequestError` that names the file, the field and the
expected values. A missing or null field has transformers' default, because older versions omit defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visor_jax.architecture import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_KERNEL,
    MAX_LAYERS,
    MAX_PINPOINT,
    MAX_PINPOINTS,
    MAX_TILE,
    MAX_VOCABULARY,
    PATTERN,
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    LayerKind,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import MAX_SLOTS, Bits, Plan, bit_string, parse_budgets
from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.hf.preprocessor import check_processor, is_standardized, pixel_statistics
from visor_jax.hf.section import Section

PLANS = {"llava_onevision": "dense", "visor": "visor"}  # model_type -> plan
LMMS_LAB_KINDS = ("llava", "llava_qwen", "llava_onevision_qwen")  # model_type in LLaVA's original code
CONVERT = (
    "the layout of LLaVA-NeXT's own code; convert it with transformers'"
    " src/transformers/models/llava_onevision/convert_llava_onevision_weights_to_hf.py, or take the converted"
    " llava-hf/llava-onevision-qwen2-0.5b-ov-hf (7b, 72b) from the hub"
)
MERGE = "merge it into its model with merge_and_unload() of peft and save that with save_pretrained"
GENERATING, PROCESSOR = "modeling_visor.VisorForConditionalGeneration", "processing_visor.VisorProcessor"
POLICY_HIDDEN_SIZE = 512  # of a policy that is added to a dense checkpoint
# transformers' Qwen2Config and SiglipVisionConfig
TEXT_DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
IMAGE_TOKEN = 151_646  # of LlavaOnevisionConfig
DEFAULT_PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def architecture_of(config: Mapping[str, Any], pixels: Section, folder: Path) -> Architecture:
    """Builds the architecture from `config.json` and the image processor's fields.

    Raises:
      RequestError: a field is invalid or not supported.
    """
    root = Section(config, f"{folder / 'config.json'}: ")
    _check_kind(root)
    text, vision = (
        _with_defaults(root.section("text_config"), TEXT_DEFAULTS),
        _with_defaults(root.section("vision_config"), VISION_DEFAULTS),
    )
    _check_supported(root, text, vision)
    ties = [section.boolean("tie_word_embeddings", False) for section in (text, root)]
    decoder, tower = _text(text, any(ties)), _vision(root, vision)
    plan = root.get("plan", PLANS[root.values["model_type"]])
    if plan not in ("dense", "visor"):
        raise root.wrong("plan", "'dense' or 'visor'")
    pattern, head_layers = _pattern(root, text, decoder.num_layers, plan)
    check_processor(folder, root, tower.patches_per_tile)
    pinpoints = _pinpoints(root, tower.tile_size)
    mean, std = pixel_statistics(pixels, tower.tile_size, pinpoints)
    return Architecture(
        text=decoder,
        vision=tower,
        cross=_cross(root, decoder, plan),
        policy=PolicyArchitecture(
            root.integer("policy_hidden_size", POLICY_HIDDEN_SIZE), root.integer("policy_max_budgets", 32)
        ),
        anyres=AnyResArchitecture(pinpoints, _max_tiles(root), mean, std, standardize=is_standardized(pixels)),
        plan=plan,
        bidirectional_vision=root.boolean("bidirectional_vision", False),
        pattern=pattern,
        head_layers=head_layers,
    )


def _pattern(config: Section, text: Section, layers: int, plan: str) -> tuple[tuple[LayerKind, ...], int]:
    """Reads `layer_pattern` and `head_layers` of a VISOR plan; exports omit default values."""
    if plan == "dense":
        return PATTERN, 0
    names, kinds = config.get("layer_pattern", list(PATTERN)), [kind.value for kind in LayerKind]
    if not (isinstance(names, list) and 0 < len(names) <= MAX_LAYERS and all(kind in kinds for kind in names)):
        raise config.wrong("layer_pattern", "a list of 'text', 'cross' and 'self'")
    pattern = tuple(LayerKind(kind) for kind in names)
    if not {LayerKind.CROSS, LayerKind.SELF} <= set(pattern):
        raise config.wrong("layer_pattern", "at least one 'cross' and one 'self'")
    head_layers = config.integer("head_layers", 0, minimum=0, maximum=MAX_LAYERS)
    if layers < head_layers + len(pattern):
        raise text.wrong("num_hidden_layers", f"at least {head_layers + len(pattern)} with plan 'visor'")
    slots = len(Plan.visor(layers, pattern, head_layers).slots)
    if pattern != PATTERN and slots > MAX_SLOTS:
        raise config.wrong("layer_pattern", f"at most {MAX_SLOTS} slots, not {slots}")
    return pattern, head_layers


def _check_kind(config: Section) -> None:
    kind = config.values.get("model_type")
    if kind in LMMS_LAB_KINDS or any(name in config.values for name in ("mm_projector_type", "mm_vision_tower")):
        raise config.wrong("model_type", f"'llava_onevision'; if this is a LLaVA-OneVision, it is in {CONVERT}")
    if not isinstance(kind, str) or kind not in PLANS:
        raise config.wrong("model_type", " or ".join(map(repr, PLANS)))


def _with_defaults(section: Section, defaults: Mapping[str, Any]) -> Section:
    present = {name: value for name, value in section.values.items() if value is not None}
    if "num_key_value_heads" in section.values:  # null means num_attention_heads
        defaults = {
            **defaults,
            "num_key_value_heads": present.get("num_attention_heads", defaults["num_attention_heads"]),
        }
    return Section({**defaults, **present}, section.where)


def _text(text: Section, tied: bool) -> TextArchitecture:
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads", maximum=MAX_HEADS)
    kv_heads = text.integer("num_key_value_heads", maximum=MAX_HEADS)
    if heads % kv_heads:
        raise text.wrong("num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}")
    head_dim = text.integer("head_dim", max(hidden // heads, 1), maximum=MAX_HEAD_DIM)
    rope = text.section("rope_scaling" if text.values.get("rope_scaling") else "rope_parameters", {})
    if head_dim % 2:
        raise text.wrong("head_dim", f"an even number, for rotary embedding, not {head_dim}")
    return TextArchitecture(
        vocab_size=text.integer("vocab_size", maximum=MAX_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size", maximum=MAX_VOCABULARY),
        num_layers=text.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope.positive("rope_theta", text.positive("rope_theta", 10_000.0)),
        rms_norm_eps=text.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
        max_positions=text.integer("max_position_embeddings", 32_768),
    )


def _cross(config: Section, text: TextArchitecture, plan: str) -> CrossAttentionArchitecture:
    heads = config.integer("cross_num_key_value_heads", text.num_kv_heads, maximum=MAX_HEADS)
    if text.num_heads % heads:
        raise config.wrong("cross_num_key_value_heads", f"a divisor of num_attention_heads, {text.num_heads}")
    taps = config.integer("cross_kernel_size", 7, maximum=MAX_KERNEL)
    if taps % 2 == 0:
        raise config.wrong("cross_kernel_size", "an odd number")
    # Layers added to a dense model are copies; those of a VISOR plan are stored and may have any number of heads.
    return CrossAttentionArchitecture(num_kv_heads=heads, kernel_size=taps, init="copy" if plan == "dense" else "zero")


def _vision(config: Section, vision: Section) -> VisionArchitecture:
    hidden, tile = vision.integer("hidden_size"), vision.integer("image_size", maximum=MAX_TILE)
    heads = vision.integer("num_attention_heads", maximum=MAX_HEADS)
    if hidden % heads:
        raise vision.wrong("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    return VisionArchitecture(
        tile_size=tile,
        patch_size=vision.integer("patch_size", maximum=tile),
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size", maximum=MAX_VOCABULARY),
        num_layers=_tower_layers(config, vision.integer("num_hidden_layers", maximum=MAX_LAYERS)),
        num_heads=heads,
        layer_norm_eps=vision.positive("layer_norm_eps", 1e-6),
    )


def _tower_layers(config: Section, stored: int) -> int:
    """Returns the number of tower layers to run; a negative `vision_feature_layer` counts from the end.

    A list of one layer is accepted. transformers concatenates the features of several layers, which is not supported.
    """
    layer = config.get("vision_feature_layer", -1)
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    run = layer + (stored + 1) * (layer < 0) if type(layer) is int else 0
    if not 1 <= run <= stored:
        raise config.wrong("vision_feature_layer", f"one layer's number, of {stored} from 1 up or from -1 down")
    return run


def _pinpoints(config: Section, tile: int) -> tuple[tuple[int, int], ...]:
    grid = config.get("image_grid_pinpoints", DEFAULT_PINPOINTS)
    pairs = isinstance(grid, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in grid)
    if not (pairs and all(type(x) is int and 0 < x <= MAX_PINPOINT and x % tile == 0 for pair in grid for x in pair)):
        missing = config.values.get("image_grid_pinpoints") is None
        default = "; it is missing, and transformers' default is multiples of 384" if missing else ""
        raise config.wrong(
            "image_grid_pinpoints", f"a list of [height, width], multiples of image_size, {tile}{default}"
        )
    if len(grid) > MAX_PINPOINTS:
        raise config.wrong("image_grid_pinpoints", f"at most {MAX_PINPOINTS} pairs")
    return tuple((height, width) for height, width in grid)


def _max_tiles(config: Section) -> int:
    ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    match = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
    if match is None:
        raise config.wrong("vision_aspect_ratio", "'anyres_max_' and a number, such as 'anyres_max_9'")
    return int(match[1])


def _check_supported(config: Section, text: Section, vision: Section) -> None:
    expected = [
        (text, "model_type", "qwen2"),
        (text, "hidden_act", "silu"),
        (text, "use_sliding_window", False),
        (text, "partial_rotary_factor", 1.0),
        (vision, "model_type", "siglip_vision_model"),
        (vision, "hidden_act", "gelu_pytorch_tanh"),
        (vision, "num_channels", 3),
        (config, "projector_hidden_act", "gelu"),
        (config, "multimodal_projector_bias", True),
        (config, "vision_feature_select_strategy", "full"),
    ]
    for section, name, supported in expected:
        if section.values.get(name) not in (None, supported):
            raise section.wrong(name, f"{supported!r}, all that this model computes")
    for name in ("rope_parameters", "rope_scaling"):  # transformers 4 uses the second
        rope = text.section(name, {})
        kind = rope.values.get("rope_type", rope.values.get("type"))
        if kind not in (None, "default") or (rope.values.get("factor") not in (None, 1, 1.0)):
            raise text.wrong(name, "none, or rope_type 'default': positions are not scaled")
        if rope.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise rope.wrong("partial_rotary_factor", "1.0, all that this model computes")
    layers = text.get("layer_types", [])
    if not (isinstance(layers, list) and all(layer == "full_attention" for layer in layers)):
        raise text.wrong("layer_types", "'full_attention' in every layer, all that this model computes")
    if config.boolean("patch_local", False):  # a field of earlier exports
        raise config.wrong("patch_local", "false: a tower without attention needs the version that exported it")
    if config.values.get("quantization_config") is not None:
        raise config.wrong("quantization_config", "none: weights that are not quantized")


def own_fields(config: Mapping[str, Any], arch: Architecture, folder: Path) -> tuple[str, list[Bits], bool, str | None]:
    """Reads the fields that our exports add: stage, viable budgets, whether there is a policy, system prompt."""
    root = Section(config, f"{folder / 'config.json'}: ")
    stage, names = root.get("training_stage", "base"), root.get("viable_budgets", [])
    system, has_policy = config.get("system_prompt"), root.boolean("has_policy", False)
    if stage not in TRAINED_STAGES:
        raise root.wrong("training_stage", f"one of {', '.join(TRAINED_STAGES)}")
    viable = parse_budgets(names, arch.num_slots, where=f"{root.where}viable_budgets")
    if len(viable) > arch.policy.max_budgets or len(set(viable)) < len(viable):
        raise root.wrong("viable_budgets", f"at most {arch.policy.max_budgets} of them, each once")
    if has_policy and not viable:
        raise root.wrong("has_policy", "false where viable_budgets has none that it could choose")
    if not isinstance(system, str | None):
        raise root.wrong("system_prompt", "text or null")
    return stage, viable, has_policy, system


def image_token_of(config: Mapping[str, Any], folder: Path) -> int:
    """Returns the placeholder token of a picture: `image_token_index`, or `image_token_id` in newer files."""
    name = "image_token_id" if config.get("image_token_index") is None else "image_token_index"
    return Section(config, f"{folder / 'config.json'}: ").integer(name, IMAGE_TOKEN, minimum=0, maximum=MAX_VOCABULARY)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_config(
    arch: Architecture,
    *,
    image_token_id: int,
    system: str | None,
    viable_budgets: Sequence[Bits],
    has_policy: bool,
    stage: str,
    dtype: str,
) -> dict[str, Any]:
    """Builds config.json: LLaVA-OneVision's fields, and for a VISOR plan our own, which `own_fields` reads."""
    shared = {
        "dtype": dtype,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in arch.anyres.pinpoints],
        "image_token_index": image_token_id,
        "system_prompt": system,
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
            "AutoModel": GENERATING,  # for tools without an image-text-to-text class, which call generate()
            "AutoModelForImageTextToText": GENERATING,
            "AutoProcessor": PROCESSOR,
        },
        "bidirectional_vision": arch.bidirectional_vision,
        "cross_kernel_size": arch.cross.kernel_size,
        "cross_num_key_value_heads": arch.cross.num_kv_heads,
        "has_policy": has_policy,
        "model_type": "visor",
        "plan": arch.plan,
        "policy_hidden_size": arch.policy.hidden_size,
        "policy_max_budgets": arch.policy.max_budgets,
        "viable_budgets": [bit_string(bits) for bits in viable_budgets],
        **({} if arch.pattern == PATTERN else {"layer_pattern": [str(kind) for kind in arch.pattern]}),
        **({"head_layers": arch.head_layers} if arch.head_layers else {}),
        **shared,
    }


def text_config(arch: Architecture) -> dict[str, Any]:
    """Builds the fields of transformers' Qwen2Config."""
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
    """Builds the fields of transformers' SiglipVisionConfig."""
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
