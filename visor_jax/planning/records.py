"""Published training records of text decoders, and the same steps by the estimator of `visor_jax.planning.roofline`.

`decoder_record` builds a step from the functions that VISOR's stages are built from. Every record has the shape, chips,
batch and remat that its publication states; none has a factor of its own. No JAX import.
"""

from __future__ import annotations

from dataclasses import dataclass

from visor_jax.planning.layers import LayerShape, Load, Remat, head_ops, layer_ops, optimizer_op
from visor_jax.planning.roofline import Collective, Estimate, Op, estimate
from visor_jax.scale.topologies import parse_topology


@dataclass(frozen=True)
class Decoder:
    """The shape of a text decoder."""

    layers: int
    shape: LayerShape
    vocab: int

    @property
    def products(self) -> float:
        """Weights in matrix products, without the output head."""
        return self.layers * float(sum(self.shape.products.values()))


@dataclass(frozen=True)
class Record:
    """One published measurement.

    Attributes:
      name: chips and model.
      decoder, topology, rows, length, remat, tensor: the run: rows per chip of `length` tokens.
      tokens_per_second: published, per chip.
      source: where.
      settings: what the source leaves open and this table assumes; empty if nothing.
    """

    name: str
    decoder: Decoder
    topology: str
    rows: float
    length: int
    remat: Remat
    tokens_per_second: float
    source: str
    tensor: int = 1
    settings: str = ""


def decoder_record(
    decoder: Decoder, topology: str, rows: float, length: int, remat: Remat, tensor: int = 1
) -> Estimate:
    """Returns the estimate of a training step with `rows` of `length` tokens per chip, sharded by FSDP and `tensor`."""
    place, shape = parse_topology(topology), decoder.shape
    tokens = rows * tensor * length  # of the chips that share each product
    pairs = tokens * length / 2
    load = Load(tokens, tokens, pairs + tokens * 256, pairs)  # blocks of 512 on the diagonal are computed in full
    ops: list[Op] = layer_ops("decoder", shape, decoder.layers, load, remat, tensor=tensor)
    ops.append(head_ops(shape.hidden, decoder.vocab, tokens, tokens, tensor=tensor))
    weights = decoder.products + 2.0 * decoder.vocab * shape.hidden
    ops.append(optimizer_op(weights / place.chips))
    ways = place.chips // tensor
    collectives = fsdp(weights / tensor, weights / tensor, ways)
    collectives += tensor_parallel(decoder.layers, tokens, shape.hidden, tensor)
    return estimate(ops, collectives, place)


def fsdp(weights: float, trained: float, ways: int) -> list[Collective]:
    """Returns the collectives of FSDP: weights gathered twice in bfloat16, gradients scattered once in float32."""
    gathers = 2 if trained else 1
    return [
        Collective("weights", "all-gather", 2.0 * gathers * weights, ways),
        Collective("gradients", "reduce-scatter", 4.0 * trained, ways),
    ]


def tensor_parallel(layers: float, positions: float, hidden: int, tensor: int) -> list[Collective]:
    """Returns the reductions of activations after attention and MLP, forward and backward: a scatter and a gather."""
    if tensor == 1:
        return []
    return [Collective("activations", "all-reduce", 2 * 2.0 * 4 * layers * positions * hidden, tensor)]


FULL = Remat(qkv=1, out=1, mlp=2 / 3, attention=1, memory=1)  # nothing reads the last product of a layer again
PRODUCTS_KEPT = Remat(attention=1, memory=1)
ALL_BUT_NORMS_KEPT = Remat(memory=1)
QKV_OUT_KEPT = Remat(mlp=2 / 3, attention=1, memory=1)
QKV_KEPT = Remat(out=1, mlp=2 / 3, attention=1, memory=1)
QKV_CONTEXT_KEPT = Remat(out=1, mlp=2 / 3, memory=1)
KV_KEPT = Remat(qkv=0.9, out=1, mlp=2 / 3, attention=1, memory=1)

MAXTEXT_16B = Decoder(32, LayerShape(4096, 64, 64, 256, 28672), 32_000)
MAXTEXT_32B = Decoder(32, LayerShape(8192, 64, 64, 256, 28672), 32_000)
LLAMA_2_7B = Decoder(32, LayerShape(4096, 32, 32, 128, 11008), 32_000)
LLAMA_3_8B = Decoder(32, LayerShape(4096, 32, 8, 128, 14336), 128_256)
LLAMA_3_70B = Decoder(80, LayerShape(8192, 64, 8, 128, 28672), 128_256)
LLAMA_3_405B = Decoder(126, LayerShape(16384, 128, 8, 128, 53248), 128_256)


def _as_published(decoder: Decoder, length: int, tera: float) -> float:
    """Tokens/s of a figure in TFLOP/s whose FLOPs count all pairs of causal attention."""
    weights = decoder.products + float(decoder.vocab * decoder.shape.hidden)
    return tera * 1e12 / (6 * weights + 12 * decoder.layers * length * decoder.shape.query_width)


_MAXTEXT = "MaxText, MaxText/configs"
_RECIPES = "tpu-recipes, training"

RECORDS = (
    Record(
        "v5e-256, MaxText 16B", MAXTEXT_16B, "v5e:16x16", 6, 2048, FULL,
        _as_published(MAXTEXT_16B, 2048, 120), f"{_MAXTEXT}/v5e/16b.sh",
    ),
    Record(
        "v5e-256, MaxText 32B", MAXTEXT_32B, "v5e:16x16", 4, 2048, FULL,
        _as_published(MAXTEXT_32B, 2048, 132), f"{_MAXTEXT}/v5e/32b.sh",
    ),
    Record(
        "v5p-128 (64 chips), MaxText 32B", MAXTEXT_32B, "v5p:4x4x4", 7, 2048, PRODUCTS_KEPT,
        _as_published(MAXTEXT_32B, 2048, 328), f"{_MAXTEXT}/v5p/32b.sh", tensor=4,
    ),
    Record(
        "v6e-8, Llama 3.1 8B", LLAMA_3_8B, "v6e:2x4", 3, 8192, QKV_OUT_KEPT, 7139,
        f"{_RECIPES}/trillium/Llama3.1-8B-MaxText",
    ),
    Record(
        "v6e-256, Llama 3.1 70B", LLAMA_3_70B, "v6e:16x16", 5, 8192, QKV_KEPT, 960,
        f"{_RECIPES}/trillium/Llama3.1-70B-MaxText",
    ),
    Record(
        "tpu7x 4x4x4, Llama 3.1 70B", LLAMA_3_70B, "tpu7x:4x4x4", 4, 8192, QKV_CONTEXT_KEPT, 2687,
        f"{_RECIPES}/ironwood/llama3.1-70b",
    ),
    Record(
        "tpu7x 4x8x8, Llama 3.1 405B", LLAMA_3_405B, "tpu7x:4x8x8", 6, 8192, KV_KEPT, 500,
        f"{_RECIPES}/ironwood/llama3.1-405b",
    ),
    Record(
        "8 x H100, Llama 2 7B", LLAMA_2_7B, "h100x8", 3, 4096, ALL_BUT_NORMS_KEPT, 11_362, "JAX-Toolbox, MaxText",
        settings="rows per GPU and remat are assumed",
    ),
    Record(
        "H200, Llama 3.1 70B", LLAMA_3_70B, "h200x256", 2, 8192, FULL, 1056, "MaxText",
        settings="number of GPUs, rows per GPU and remat are assumed",
    ),
    Record(
        "8 x H100, Llama 3.1 8B (torchtitan)", LLAMA_3_8B, "h100x8", 2, 8192, QKV_KEPT, 6667, "torchtitan",
        settings="rows per GPU and remat are assumed; another framework, without its compiler",
    ),
)  # fmt: skip


def compare(record: Record) -> tuple[Estimate, float]:
    """Returns the estimate of a record and its error: estimated over published tokens per second, minus 1."""
    found = decoder_record(record.decoder, record.topology, record.rows, record.length, record.remat, record.tensor)
    return found, record.rows * record.length / found.seconds / record.tokens_per_second - 1
