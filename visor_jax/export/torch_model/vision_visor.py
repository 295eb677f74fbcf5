"""The SigLIP tower, the connector, and the AnyRes stitching of tiles into visual tokens, in PyTorch.

In: normalized tiles [tiles, 3, S, S] and the pictures' sizes. Out: each picture's visual tokens [length, D]. Arithmetic
and parameter names are those of transformers' LLaVA-OneVision, so its checkpoints and processor are compatible.
Every export contains this file; it needs torch and transformers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_visor import VisorConfig

Size = tuple[int, int]  # (height, width)


class VisionAttention(nn.Module):
    """Self-attention among the patches of a tile."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, patches, Dv] to [N, patches, Dv]."""
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """The MLP of an encoder layer, with tanh-approximated GELU."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., Dv] to [..., Dv]."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(GradientCheckpointingLayer):
    """One encoder layer: attention and MLP."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        vision = config.vision_config
        self.layer_norm1 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.self_attn = VisionAttention(vision.hidden_size, vision.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.mlp = VisionMLP(vision.hidden_size, vision.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, patches, Dv] to [N, patches, Dv]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """Patch embeddings plus learned position embeddings."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, vision.hidden_size)

    def forward(self, tiles: Tensor) -> Tensor:
        """Maps tiles [N, 3, S, S] to [N, patches, Dv]."""
        patches = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=patches.device))


class VisionEncoder(nn.Module):
    """All encoder layers."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_config.num_hidden_layers))

    def forward(self, x: Tensor, hidden_states: list[Tensor] | None = None) -> Tensor:
        """Runs the layers on `x` [N, patches, Dv]; appends their inputs and the output to `hidden_states`, if given."""
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


class VisionModel(nn.Module):
    """Embeddings and encoder, under the names of transformers' SigLIP."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, tiles: Tensor, hidden_states: list[Tensor] | None = None) -> Tensor:
        """Maps tiles [N, 3, S, S] to [N, patches, Dv]; `hidden_states` as in `VisionEncoder.forward`."""
        return self.encoder(self.embeddings(tiles), hidden_states)


class VisionTower(nn.Module):
    """The tower without SigLIP's final norm."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, tiles: Tensor, hidden_states: list[Tensor] | None = None) -> Tensor:
        """Maps tiles [N, 3, S, S] to patch features [N, patches, Dv]; `hidden_states` as in `VisionEncoder.forward`."""
        return self.vision_model(tiles, hidden_states)


class Connector(nn.Module):
    """The two-layer MLP from patch features to visual tokens, with exact GELU."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Maps patch features [..., Dv] to [..., D]."""
        return self.linear_2(functional.gelu(self.linear_1(features)))


def best_pinpoint(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """Returns the grid with the largest effective resolution for a picture; of equal ones the smallest, then the first.

    Args:
        size: (height, width) of the picture.
        pinpoints: grids (height, width) in pixels.
    """
    height, width = size
    best, best_key = (0, 0), (-1, 0)
    for pin_height, pin_width in pinpoints:
        scale = min(pin_width / width, pin_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, effective - pin_height * pin_width)
        if key > best_key:
            best, best_key = (pin_height, pin_width), key
    return best


def tile_grid(size: Size, config: VisorConfig) -> Size:
    """Returns the rows and columns of tiles that a single picture is cut into, without the base tile."""
    height, width = best_pinpoint(size, config.image_grid_pinpoints)
    return height // config.tile_size, width // config.tile_size


def unpadded(size: Size, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns to drop on each side of a stitched [height, width] map: they show only padding."""
    if size[1] / size[0] > width / height:
        return (height - int(round(size[0] * (width / size[1]), 7))) // 2, 0
    return 0, (width - int(round(size[1] * (height / size[0]), 7))) // 2


def shrunk(height: int, width: int, side: int, max_tiles: int) -> Size:
    """Returns the size of a map, shrunk if it exceeds 1.1^2 * max_tiles tiles of side x side patches."""
    ratio = math.sqrt(height * width / (max_tiles * side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def pack(features: Tensor, size: Size, newline: Tensor, config: VisorConfig) -> Tensor:
    """Returns the visual tokens [length, D] of one picture from its tiles' features [tiles, patches, D].

    A single tile is followed by one newline. Several tiles give the base tile, then the stitched crops without padding,
    shrunk if too large, with a newline after each row.
    """
    if features.shape[0] == 1:
        return torch.cat([features[0], newline[None]])
    side = config.patches_per_side
    crops = features[1:].unflatten(0, tile_grid(size, config)).unflatten(2, (side, side))
    stitched = crops.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # [D, height, width]
    height, width = stitched.shape[1:]
    top, left = unpadded(size, height, width)
    stitched = stitched[:, top : height - top, left : width - left]
    height, width = shrunk(height - 2 * top, width - 2 * left, side, config.max_tiles)
    if (height, width) != tuple(stitched.shape[1:]):
        stitched = functional.interpolate(stitched[None], (height, width), mode="bilinear")[0]
    rows = torch.cat([stitched, newline[:, None, None].expand(-1, height, 1)], dim=2)
    return torch.cat([features[0], rows.flatten(1).T])
