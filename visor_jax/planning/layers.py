"""Operations of transformer layers for the roofline: decoder layers, encoder layers, and what remat runs again.

In: shapes, positions with padding and without. Out: `Op`s of one chip. VISOR's stages and the published records of text
decoders are built from the same functions. No JAX import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visor_jax.planning.roofline import ATTENTION, MATMUL, MEMORY, Op

WORD = 2  # bytes of an activation: bfloat16


@dataclass(frozen=True)
class Remat:
    """How much of a layer's forward pass runs again before its backward pass, from 0 to 1 for each class.

    Attributes:
      qkv, out, mlp: of the projections before and after attention, and of the MLP's products.
      attention: of the attention kernel.
      memory: of norms, activations and residuals.
    """

    qkv: float = 0.0
    out: float = 0.0
    mlp: float = 0.0
    attention: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer; a gated MLP has three products, the other two."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    gated: bool = True

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def products(self) -> Mapping[str, int]:
        """Multiply-adds per token, which are also the numbers of weights."""
        return {
            "qkv": self.hidden * (self.query_width + 2 * self.kv_width),
            "out": self.query_width * self.hidden,
            "mlp": (3 if self.gated else 2) * self.hidden * self.mlp,
        }


@dataclass(frozen=True)
class Load:
    """Positions that layers compute on, and those among them that hold tokens; pairs of a query and a key likewise."""

    positions: float
    tokens: float
    pairs: float
    useful_pairs: float


def layer_ops(
    name: str,
    shape: LayerShape,
    count: float,
    load: Load,
    remat: Remat,
    backward: float = 2.0,
    tensor: int = 1,
    mask: str = "causal",
) -> list[Op]:
    """Returns the operations of `count` layers on one of `tensor` chips that share each product."""
    again = {"qkv": remat.qkv, "out": remat.out, "mlp": remat.mlp}
    width, mlp = shape.query_width // tensor, shape.mlp // tensor
    dims = {"qkv": (shape.hidden, width), "out": (width, shape.hidden), "mlp": (shape.hidden, mlp)}
    moved = {
        "qkv": shape.hidden + (shape.query_width + 2 * shape.kv_width) / tensor,
        "out": shape.query_width / tensor + shape.hidden,
        "mlp": (3 if shape.gated else 2) * (shape.hidden + shape.mlp / tensor),
    }
    ops = []
    for part, weights in shape.products.items():
        flops = 2.0 * count * weights / tensor
        transfer = WORD * count * (load.positions * moved[part] + weights / tensor)
        ops.append(
            Op(
                name,
                MATMUL,
                flops * load.positions,
                transfer,
                dims[part],
                again[part],
                backward,
                flops * load.tokens,
            )
        )
    ops.append(_attention_op(name, shape, count, load, remat, backward, tensor, mask))
    rotary = 4 * (shape.query_width + shape.kv_width) if shape.gated else 0  # the tower has learned positions
    values = 8 * shape.hidden + (rotary + (3 if shape.gated else 2) * shape.mlp) / tensor
    transfer = WORD * count * load.positions * values
    ops.append(Op(name, MEMORY, 0.0, transfer, (), remat.memory, backward))
    return ops


def _attention_op(
    name: str, shape: LayerShape, count: float, load: Load, remat: Remat, backward: float, tensor: int, mask: str
) -> Op:
    attention = 4.0 * count * shape.query_width / tensor
    reads = WORD * count * load.positions * 2 * (shape.query_width + shape.kv_width) / tensor
    return Op(
        name,
        ATTENTION,
        attention * load.pairs,
        reads,
        (shape.head_dim,),
        remat.attention,
        min(backward, 1) * 2,  # attention has no weights: both halves of its backward pass are for activations
        attention * load.useful_pairs,
        mask,
    )


def head_ops(hidden: int, vocab: int, positions: float, tokens: float, backward: float = 2.0, tensor: int = 1) -> Op:
    """Returns the product with the vocabulary, computed in chunks: once more in the backward pass."""
    flops = 2.0 * hidden * vocab / tensor
    transfer = (4 * positions * vocab + WORD * hidden * vocab) / tensor  # float32 logits
    return Op("logits", MATMUL, flops * positions, transfer, (hidden, vocab), 1.0, backward, flops * tokens)


def optimizer_op(trained_per_chip: float) -> Op:
    """Returns AdamW's update: weights, two moments and gradients in float32, read and written, except gradients."""
    return Op("optimizer", MEMORY, 0.0, 28.0 * trained_per_chip, (), 0.0, 0.0)
