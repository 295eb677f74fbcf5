"""Configuration of a VISOR model in PyTorch: the content of an exported folder's `config.json`.

In: keyword arguments, or a folder through `from_pretrained`. Out: the shapes of the model, its viable budgets and the
names of budgets. Every export contains this file; it needs torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig

Bits = tuple[bool, ...]
PATTERN = ("text", "cross", "self")


class VisorConfig(PretrainedConfig):
    """LLaVA-OneVision's configuration with the fields that VISOR adds.

    Args:
        text_config: configuration of the Qwen2 decoder, as a dict or a `Qwen2Config`.
        vision_config: configuration of the SigLIP tower; all of its `num_hidden_layers` run, without a final norm.
        image_token_index: id of the placeholder token, which occurs once per visual token.
        image_grid_pinpoints: grids (height, width) in pixels that a single picture may be cut into; empty: every
            picture is one tile.
        vision_aspect_ratio: "anyres_max_N": a stitched picture with more tokens than N tiles is shrunk to that number.
        plan: "visor" (super-blocks of text-only, cross-attention and optional self-attention layers), or "dense"
            (every layer is a self-attention layer over all tokens, as in LLaVA-OneVision).
        layer_pattern: kinds of the layers of a super-block ("text", "cross", "self"), in order; every "self" is a slot.
            Super-blocks repeat as often as they fit; the remaining layers are text-only. None: text, cross, self.
        head_layers: number of text-only layers before the first super-block.
        bidirectional_vision: in self-attention layers, the tokens of a picture attend to each other in both directions.
        cross_num_key_value_heads: number of key/value heads of the cross-attention layers.
        cross_kernel_size: taps of the conditional position's depthwise convolution.
        policy_hidden_size, policy_max_budgets: hidden size and number of outputs of the policy's MLP.
        viable_budgets: names ("0b101", leftmost bit first slot) of the budgets that the policy chooses from, in the
            order of its outputs.
        has_policy: the policy was trained, so "auto" is possible, and is the default budget.
        system_prompt: text of the system turn that the model was trained with; None: no system turn.
        use_cache: whether a forward pass returns keys and values by default.
    """

    model_type = "visor"
    sub_configs: ClassVar[Any] = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}
    attribute_map: ClassVar = {"image_token_id": "image_token_index"}

    def __init__(
        self,
        text_config: dict | Qwen2Config | None = None,
        vision_config: dict | SiglipVisionConfig | None = None,
        image_token_index: int = 151646,
        image_grid_pinpoints: Sequence[Sequence[int]] = (),
        vision_aspect_ratio: str = "anyres_max_9",
        plan: str = "visor",
        layer_pattern: Sequence[str] | None = None,
        head_layers: int = 0,
        bidirectional_vision: bool = False,
        cross_num_key_value_heads: int | None = None,
        cross_kernel_size: int = 7,
        policy_hidden_size: int = 256,
        policy_max_budgets: int = 32,
        viable_budgets: Sequence[str] = (),
        has_policy: bool = False,
        system_prompt: str | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs,
    ):
        if plan not in ("visor", "dense"):
            raise ValueError(f"plan: {plan!r}; expected 'visor' or 'dense'")
        if kwargs.pop("patch_local", False):  # a field of earlier exports
            raise ValueError("patch_local: True; a tower without attention needs the version that exported it")
        text = Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config or Qwen2Config()
        vision = SiglipVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.text_config = text
        self.vision_config = vision or SiglipVisionConfig(vision_use_head=False)
        self.image_token_index = image_token_index
        self.image_grid_pinpoints = [list(pinpoint) for pinpoint in image_grid_pinpoints]
        self.vision_aspect_ratio = vision_aspect_ratio
        self.plan = plan
        self.layer_pattern = list(PATTERN if layer_pattern is None else layer_pattern)
        if set(self.layer_pattern) - set(PATTERN) or not {"cross", "self"} <= set(self.layer_pattern):
            raise ValueError(
                f"layer_pattern: {self.layer_pattern}; expected 'text', 'cross' and 'self', the last two at least once"
            )
        self.head_layers = head_layers
        self.bidirectional_vision = bidirectional_vision
        self.cross_num_key_value_heads = cross_num_key_value_heads or self.num_key_value_heads
        self.cross_kernel_size = cross_kernel_size
        self.policy_hidden_size = policy_hidden_size
        self.policy_max_budgets = policy_max_budgets
        self.viable_budgets = list(viable_budgets)
        self.has_policy = has_policy
        self.system_prompt = system_prompt
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kind of each layer: "text", "cross", or "self"; in a VISOR plan a "self" layer is a slot."""
        layers = self.text_config.num_hidden_layers
        if self.plan == "dense":
            return ("self",) * layers
        blocks = (layers - self.head_layers) // len(self.layer_pattern)
        kinds = ["text"] * self.head_layers + self.layer_pattern * blocks
        return (*kinds, *["text"] * (layers - len(kinds)))

    @property
    def slots(self) -> dict[int, int]:
        """Slot number of each optional layer, by layer index."""
        return {} if self.plan == "dense" else self._numbered("self")

    @property
    def crosses(self) -> dict[int, int]:
        """Number of each cross-attention, by the index of the layer that it precedes."""
        return self._numbered("cross")

    def _numbered(self, kind: str) -> dict[int, int]:
        indices = [index for index, layer_kind in enumerate(self.layer_kinds) if layer_kind == kind]
        return {index: number for number, index in enumerate(indices)}

    @property
    def num_slots(self) -> int:
        """Number of optional self-attention layers: the bits of a budget."""
        return len(self.slots)

    @property
    def shared_layers(self) -> range:
        """Layers before the first slot; they are the same under every budget."""
        return range(min(self.slots, default=0))

    @property
    def max_tiles(self) -> int:
        """The N of "anyres_max_N"."""
        return int(self.vision_aspect_ratio.removeprefix("anyres_max_"))

    @property
    def viable(self) -> list[Bits]:
        """Viable budgets as bits, in the order of the policy's outputs."""
        return [bits_of(name, self.num_slots) for name in self.viable_budgets]

    def resolve_budget(self, budget: str | Sequence[bool]) -> Bits | None:
        """Returns the slots that a budget switches on; None for "auto", which the policy decides for each sample.

        Args:
            budget: "auto", "full", "empty", "0b101" (leftmost bit first slot), "3" (the best viable budget with three
                slots on), or one boolean per slot.

        Raises:
            ValueError: the model has no such budget.
        """
        if not isinstance(budget, str):
            bits = tuple(bool(bit) for bit in budget)
            if len(bits) != self.num_slots:
                raise ValueError(f"budget: {len(bits)} booleans; this model has {self.num_slots} slots")
            return bits
        if budget == "auto":
            if self.plan == "visor" and not (self.has_policy and self.viable_budgets):
                raise ValueError("budget: 'auto' needs a trained policy, and this model was exported without one")
            return None if self.plan == "visor" else ()
        if budget in ("full", "empty"):
            return (budget == "full",) * self.num_slots
        if budget.startswith("0b"):
            return bits_of(budget, self.num_slots)
        if budget.isdecimal():
            best = next((bits for bits in self.viable if sum(bits) == int(budget)), None)
            if best is None:
                counts = sorted({sum(bits) for bits in self.viable})
                raise ValueError(f"budget: no viable budget has {budget} slots on; expected one of {counts}")
            return best
        raise ValueError(f"budget: {budget!r}; expected auto, full, empty, a number of slots, or bits such as 0b101")

    def resolve_budgets(self, budget: Any, batch: int) -> list[Bits | None]:
        """Returns the budget of each sample; None for a sample whose budget the policy decides.

        Args:
            budget: one for all samples, or a list (or a bool tensor [batch, slots]) with one per sample; None: "auto"
                if the policy was trained, else "full".
            batch: number of samples.

        Raises:
            ValueError: the model has no such budget, or the number of budgets differs from that of samples.
        """
        if budget is None:
            budget = "auto" if self.has_policy else "full"
        if isinstance(budget, int):
            budget = str(budget)
        budgets: Any = budget.tolist() if hasattr(budget, "tolist") else budget
        if isinstance(budgets, str) or all(isinstance(bit, bool | int) for bit in budgets):
            return [self.resolve_budget(budgets)] * batch
        if len(budgets) != batch:
            raise ValueError(f"budget: {len(budgets)} budgets for {batch} samples")
        return [self.resolve_budget(sample_budget) for sample_budget in budgets]

    @property
    def tile_size(self) -> int:
        """Pixels along a side of a tile."""
        return _one_side(self.vision_config.image_size)

    @property
    def patch_size(self) -> int:
        """Pixels along a side of a patch."""
        return _one_side(self.vision_config.patch_size)

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads of the decoder's layers."""
        return self.text_config.num_key_value_heads or self.text_config.num_attention_heads

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies. Raises ValueError for scaled rotary embeddings."""
        parameters = dict(self.text_config.rope_parameters or {})
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(f"text_config.rope_parameters: {parameters}; expected rope_type 'default'")
        return float(str(parameters["rope_theta"]))

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        text = self.text_config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def decoder_flops(self, bits: Bits, num_visual: int, num_text: int) -> float:
        """Returns the decoder FLOPs of a prompt under a budget; causal attention counts half, logits only once."""
        text = self.text_config
        size, heads, kv = (
            text.hidden_size,
            text.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        )
        layer = 2.0 * size * (2 * heads + 2 * kv + 3 * text.intermediate_size)  # projections of one token
        joint = sum(bits) if self.plan == "visor" else text.num_hidden_layers
        both = num_visual + num_text
        total = 2.0 * size * text.vocab_size + joint * (both * layer + 2.0 * both**2 * heads)
        if self.bidirectional_vision:
            total += joint * 2.0 * num_visual**2 * heads
        total += (text.num_hidden_layers - joint) * (num_text * layer + 2.0 * num_text**2 * heads)
        keys = num_visual * (
            4.0 * size * self.cross_num_key_value_heads * self.head_dim + 2.0 * self.cross_kernel_size * size
        )
        return total + len(self.crosses) * (4.0 * num_text * heads * (size + num_visual) + keys)


def _one_side(size: int | Sequence[int]) -> int:
    if not isinstance(size, int):
        raise ValueError(f"vision_config: size {size}; expected one number, because tiles and patches are square")
    return size


def bits_of(name: str, num_slots: int) -> Bits:
    """Returns the slots that a name such as "0b101" switches on (leftmost bit first slot)."""
    digits = name.removeprefix("0b")
    if len(digits) != num_slots or set(digits) - {"0", "1"}:
        raise ValueError(f"budget: {name!r}; expected 0b and one bit for each of this model's {num_slots} slots")
    return tuple(digit == "1" for digit in digits)
