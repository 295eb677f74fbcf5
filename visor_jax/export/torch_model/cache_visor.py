"""Where tokens stand, and what a VISOR decoder keeps between steps of generation, in PyTorch.

A sequence arrives as in transformers: one column for each token, pictures as runs of placeholder columns, padding
anywhere. `Layout` sorts its columns into the two streams of the decoder, visual tokens V and text tokens T, and can
merge and split them again. `VisorCache` keeps keys and values: of text in every layer, of visual tokens only in
cross-attention layers and, sample by sample, in self-attention layers that the sample's budget has on.
This file travels inside every export; it needs torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

PADDING = 1 << 40  # the order of a column that is padding: after everything, so that no token sees it
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """The new columns of a batch.

    Attributes:
        order: int64 [B, S], each column's position among its sample's tokens; `PADDING` for padding.
        reach: int64 [B, S], the last order that each column may see in a self-attention layer.
        visual_index, text_index: int64 [B, Nv] and [B, Nt], the columns of V and of T, in order, then any columns.
        visual_valid, text_valid: bool, of the same shapes.
        merge_index: int64 [B, S], where each column is found in [V; T].
    """

    order: Tensor
    reach: Tensor
    visual_index: Tensor
    visual_valid: Tensor
    text_index: Tensor
    text_valid: Tensor
    merge_index: Tensor

    @classmethod
    def of(cls, is_image: Tensor, mask: Tensor, bidirectional: bool) -> Layout:
        """The last S columns of `mask` (bool [B, past + S]); `is_image` (bool [B, S]) tells which are visual tokens."""
        steps = is_image.shape[1]
        order = torch.where(mask, mask.long().cumsum(1) - 1, PADDING)[:, -steps:]
        new = mask[:, -steps:]
        is_image, is_text = is_image & new, ~is_image & new
        visual_index, visual_valid = _columns(is_image)
        text_index, text_valid = _columns(is_text)
        in_visual, in_text = is_image.long().cumsum(1) - 1, is_text.long().cumsum(1) - 1
        merge_index = torch.where(is_image, in_visual, visual_index.shape[1] + in_text).clamp(min=0)
        reach = torch.where(is_image, _run_ends(is_image, order), order) if bidirectional else order
        return cls(order, reach, visual_index, visual_valid, text_index, text_valid, merge_index)

    def rows(self, rows: Tensor) -> Layout:
        return Layout(**{name: value[rows] for name, value in vars(self).items()})

    @property
    def text_order(self) -> Tensor:
        return torch.where(self.text_valid, self.order.gather(1, self.text_index), PADDING)

    @property
    def last_text(self) -> Tensor:
        """For each column, the index in T of the last text token at or before it: int64 [B, S]."""
        counts = torch.zeros_like(self.order).scatter_add(1, self.text_index, self.text_valid.long())
        return (counts.cumsum(1) - 1).clamp(min=0)

    def merge(self, visual: Tensor, text: Tensor) -> Tensor:
        """[B, Nv, D] and [B, Nt, D] to [B, S, D] in column order; padding columns hold any value."""
        return _take(torch.cat([visual, text], dim=1), self.merge_index)

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `merge`; padding of V is zero."""
        return _take(both, self.visual_index) * self.visual_valid[..., None], _take(both, self.text_index)


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The columns chosen in each row, in order, padded to the longest row; and which of them are not padding."""
    counts = chosen.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    index = torch.argsort((~chosen).long(), dim=1, stable=True)[:, :longest]
    return index, torch.arange(longest, device=chosen.device) < counts[:, None]


def _run_ends(chosen: Tensor, order: Tensor) -> Tensor:
    """For each chosen column, the order of the last column of its unbroken run."""
    follows = torch.nn.functional.pad(chosen[:, 1:], (0, 1))
    ends = torch.where(chosen & ~follows, order, PADDING)
    return ends.flip(1).cummin(1).values.flip(1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class VisorCache(Cache):
    """Keys and values of the tokens so far; `budgets` are the slots that each sample has on.

    A layer's entry has up to two parts: "joint" for the samples in which it is a self-attention layer over all tokens,
    "text" for those in which it sees text alone. Each part holds the rows of its samples, in order.
    """

    def __init__(self, num_slots: int, batch: int, device: torch.device):
        super().__init__(layers=[])
        empty = torch.zeros((batch, 0), dtype=torch.long, device=device)
        self.budgets: Tensor | None = None if num_slots else empty.bool()  # bool [B, slots]; None until decided
        self.order, self.text_order = empty, empty  # of all columns and of T; `PADDING` where padded
        self.parts: dict[tuple[int, str], KeysValues] = {}
        self.visual: dict[int, KeysValues] = {}  # of the cross-attention layers, by super-block
        self.visual_valid = empty.bool()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, pictures and padding included."""
        return self.order.shape[1]

    def append(self, layer: int, kind: str, new: KeysValues) -> KeysValues:
        """Add new tokens' keys and values [rows, heads, n, E] to a layer's part; returns all of that part's."""
        if (past := self.parts.get((layer, kind))) is not None:
            new = (torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2))
        self.parts[layer, kind] = new
        return new

    def num_bytes(self) -> int:
        """Bytes that the keys and values take."""
        pairs = [*self.parts.values(), *self.visual.values()]
        return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i], which must be of the same prompt (and so have the same budget)."""
        beam_idx = beam_idx.to(self.order.device)
        self.order, self.text_order = self.order[beam_idx], self.text_order[beam_idx]
        self.visual_valid = self.visual_valid[beam_idx]
        self.visual = {block: (key[beam_idx], value[beam_idx]) for block, (key, value) in self.visual.items()}
        for (layer, kind), (key, value) in self.parts.items():
            rows = self._rows_of(layer, kind)
            local = beam_idx if rows is None else torch.searchsorted(rows, beam_idx[rows])
            self.parts[layer, kind] = key[local], value[local]

    def _rows_of(self, layer: int, kind: str) -> Tensor | None:
        """The samples that a part holds; None for all of them."""
        other = "text" if kind == "joint" else "joint"
        if (layer, other) not in self.parts or self.budgets is None:
            return None
        on = self.budgets[:, layer // 3]
        return (on if kind == "joint" else ~on).nonzero()[:, 0]

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, *_) -> None:
        raise NotImplementedError("a VISOR cache cannot be rolled back, so assisted generation is not possible with it")
