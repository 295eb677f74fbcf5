"""What a checkpoint's `config.json` and `preprocessor_config.json` say, every field checked before it is believed.

In: a folder in Hugging Face's format. Out: its `Architecture`, and what our own exports add. Whatever is missing, of
another type or out of range is a `RequestError` that names the file, the field and what is expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import Bits, parse_budgets
from visor_jax.config_schema import TRAINED_STAGES
from visor_jax.errors import RequestError
from visor_jax.workdir import read_json

KINDS = {"llava_onevision": "dense", "visor": "visor"}  # model_type -> plan
POLICY_HIDDEN_SIZE = 512  # of a policy that a dense checkpoint is given
MOST_LAYERS, MOST = 1000, 1 << 24  # what no model has: a damaged field is refused before it is computed with


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; raises RequestError."""
    if not path.exists():
        raise RequestError(f"{path}: no such file; expected a folder in Hugging Face's format")
    found = read_json(path)
    if not isinstance(found, dict):
        raise RequestError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


@dataclass(frozen=True)
class Section:
    """An object of a configuration file; `where` is the file and, with a dot behind it, the object's name.

    A field without a default must be there; null is as good as absent. Each method raises RequestError.
    """

    values: Mapping[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> RequestError:
        return RequestError(f"{self.where}{name}={self.values.get(name)!r}: expected {expected}")

    def get(self, name: str, default: Any = None) -> Any:
        found = self.values.get(name)
        found = default if found is None else found
        if found is None:
            raise RequestError(
                f"{self.where}{name}: missing; expected a whole configuration, as transformers writes it"
            )
        return found

    def section(self, name: str, default: Mapping[str, Any] | None = None) -> Section:
        found = self.get(name, default)
        if not isinstance(found, Mapping):
            raise self.wrong(name, "an object")
        return Section(found, f"{self.where}{name}.")

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        found = self.get(name, default)
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return found

    def positive(self, name: str, default: float | None = None) -> float:
        found = self.get(name, default)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise self.wrong(name, "a positive number")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.get(name, default)
        if not isinstance(found, bool):
            raise self.wrong(name, "true or false")
        return found

    def channels(self, name: str, *, least: float) -> tuple[float, float, float]:
        """A number above `least` for each of red, green and blue."""
        found = self.get(name, [0.5, 0.5, 0.5])
        is_list = isinstance(found, list) and len(found) == 3
        if not (is_list and all(type(x) in (int, float) and least < x < math.inf for x in found)):
            raise self.wrong(name, f"three numbers above {least:g}")
        red, green, blue = map(float, found)
        return red, green, blue


def architecture_of(config: Mapping[str, Any], preprocessor: Mapping[str, Any], folder: Path) -> Architecture:
    """The architecture that `config.json` and `preprocessor_config.json` describe.

    Raises:
      RequestError: a field is missing or damaged, or asks for what this model does not compute.
    """
    whole = Section(config, f"{folder / 'config.json'}: ")
    pixels = Section(preprocessor, f"{folder / 'preprocessor_config.json'}: ")
    kind = whole.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise whole.wrong("model_type", " or ".join(map(repr, KINDS)))
    text, vision = whole.section("text_config"), whole.section("vision_config")
    _check_supported(whole, text, vision)
    ties = [section.flag("tie_word_embeddings", False) for section in (text, whole)]
    kv_heads, tile = text.whole("num_key_value_heads"), vision.whole("image_size")
    plan = whole.get("plan", KINDS[kind])
    if plan not in ("dense", "visor"):
        raise whole.wrong("plan", "'dense' or 'visor'")
    return Architecture(
        text=_text(text, kv_heads, any(ties)),
        vision=VisionArchitecture(
            tile_size=tile,
            patch_size=vision.whole("patch_size", most=tile),
            hidden_size=vision.whole("hidden_size"),
            intermediate_size=vision.whole("intermediate_size"),
            num_layers=_tower_layers(whole, vision.whole("num_hidden_layers", most=MOST_LAYERS)),
            num_heads=_divisor(vision, "num_attention_heads", vision.whole("hidden_size"), "hidden_size"),
            layer_norm_eps=vision.positive("layer_norm_eps", 1e-6),
            patch_local=whole.flag("patch_local", False),
        ),
        cross=CrossAttentionArchitecture(
            num_kv_heads=whole.whole("cross_num_key_value_heads", kv_heads),
            kernel_size=whole.whole("cross_kernel_size", 7),
        ),
        policy=PolicyArchitecture(
            whole.whole("policy_hidden_size", POLICY_HIDDEN_SIZE), whole.whole("policy_max_budgets", 32)
        ),
        anyres=AnyResArchitecture(
            pinpoints=_pinpoints(whole, tile),
            max_tiles=_max_tiles(whole),
            image_mean=pixels.channels("image_mean", least=-math.inf),
            image_std=pixels.channels("image_std", least=0.0),
        ),
        plan=plan,
        bidirectional_vision=whole.flag("bidirectional_vision", False),
    )


def _text(text: Section, kv_heads: int, tied: bool) -> TextArchitecture:
    hidden, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    if heads % kv_heads:
        raise text.wrong("num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}")
    rope, head_dim = text.section("rope_parameters", {}), text.whole("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        raise text.wrong("head_dim", f"an even number, for rotary embedding, not {head_dim}")
    return TextArchitecture(
        vocab_size=text.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=text.whole("intermediate_size"),
        num_layers=text.whole("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope.positive("rope_theta", text.positive("rope_theta", 10_000.0)),
        rms_norm_eps=text.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
    )


def _divisor(section: Section, name: str, of: int, what: str) -> int:
    found = section.whole(name)
    if of % found:
        raise section.wrong(name, f"a divisor of {what}, {of}")
    return found


def _tower_layers(config: Section, stored: int) -> int:
    """Layers of the tower that are run: `vision_feature_layer` counts from the end if it is negative."""
    layer = config.get("vision_feature_layer", -1)
    run = layer + (stored + 1) * (layer < 0) if type(layer) is int else 0
    if not 1 <= run <= stored:
        raise config.wrong("vision_feature_layer", f"one layer's number, of {stored} from 1 up or from -1 down")
    return run


def _pinpoints(config: Section, tile: int) -> tuple[tuple[int, int], ...]:
    found = config.get("image_grid_pinpoints")
    pairs = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    if not (pairs and all(type(x) is int and 0 < x <= MOST and x % tile == 0 for pair in found for x in pair)):
        raise config.wrong("image_grid_pinpoints", f"a list of [height, width], multiples of image_size, {tile}")
    return tuple((height, width) for height, width in found)


def _max_tiles(config: Section) -> int:
    found = config.get("vision_aspect_ratio", "anyres_max_9")
    named = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", found) if isinstance(found, str) else None
    if named is None:
        raise config.wrong("vision_aspect_ratio", "'anyres_max_' and a number, such as 'anyres_max_9'")
    return int(named[1])


def _check_supported(config: Section, text: Section, vision: Section) -> None:
    expected = [
        (text, "model_type", "qwen2"),
        (text, "hidden_act", "silu"),
        (text, "use_sliding_window", False),
        (vision, "model_type", "siglip_vision_model"),
        (vision, "hidden_act", "gelu_pytorch_tanh"),
        (vision, "num_channels", 3),
        (config, "projector_hidden_act", "gelu"),
        (config, "multimodal_projector_bias", True),
        (config, "vision_feature_select_strategy", "full"),
        (text.section("rope_parameters", {}), "rope_type", "default"),
    ]
    for section, name, wanted in expected:
        if section.values.get(name) not in (None, wanted):
            raise section.wrong(name, f"{wanted!r}, all that this model computes")
    if text.values.get("rope_scaling"):
        raise text.wrong("rope_scaling", "none")


def own_fields(config: Mapping[str, Any], arch: Architecture, folder: Path) -> tuple[str, list[Bits], bool, str | None]:
    """Stage, viable budgets, whether there is a policy, system prompt: what our own exports add."""
    whole = Section(config, f"{folder / 'config.json'}: ")
    stage, names = whole.get("training_stage", "base"), whole.get("viable_budgets", [])
    system, has_policy = config.get("system_prompt"), whole.flag("has_policy", False)
    if stage not in TRAINED_STAGES:
        raise whole.wrong("training_stage", f"one of {', '.join(TRAINED_STAGES)}")
    viable = parse_budgets(names, arch.num_slots, where=f"{whole.where}viable_budgets")
    if len(viable) > arch.policy.max_budgets or len(set(viable)) < len(viable):
        raise whole.wrong("viable_budgets", f"at most {arch.policy.max_budgets} of them, each once")
    if has_policy and not viable:
        raise whole.wrong("has_policy", "false where viable_budgets has none that it could choose")
    if not isinstance(system, str | None):
        raise whole.wrong("system_prompt", "text or null")
    return stage, viable, has_policy, system


def image_token_of(config: Mapping[str, Any], folder: Path) -> int:
    """The token id that stands for a picture: `image_token_index`, or `image_token_id` in newer files."""
    name = "image_token_index" if "image_token_index" in config else "image_token_id"
    return Section(config, f"{folder / 'config.json'}: ").whole(name, least=0)
