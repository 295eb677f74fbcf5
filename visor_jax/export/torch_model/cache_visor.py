"""Token layout and key/value cache of a VISOR decoder in PyTorch.

A batch has the form that transformers uses: one column per token, pictures as runs of placeholder columns, padding
anywhere. `Layout` sorts the columns into the decoder's two streams, visual tokens V and text tokens T, and merges and
splits them. `VisorCache` keeps keys and values: of text in every layer, of visual tokens only in cross-attention layers
and in self-attention layers that the sample's budget has on.
Every export contains this file; it needs torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_visor import VisorConfig

PADDING = 1 << 40  # order of a padding column: after every token, so that no token attends to it
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Positions of a batch's new columns, and their division into V and T.

    Attributes:
        order: int64 [B, S], each column's position among its sample's tokens; `PADDING` for padding.
        reach: int64 [B, S], the last order that each column may attend to in a self-attention layer.
        visual_index, text_index: int64 [B, Nv] and [B, Nt], the columns of V and of T, in order; padding entries hold
            any column.
        visual_valid, text_valid: bool of the same shapes, False for padding entries.
        merge_index: int64 [B, S], each column's index in [V; T].
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
        """Builds the layout of the last S columns.

        Args:
            is_image: bool [B, S], which columns are visual tokens.
            mask: bool [B, past + S], False for padding.
            bidirectional: the tokens of a picture attend to each other in both directions.
        """
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
        """Returns the layout of the samples `rows`, int64 [n]."""
        return Layout(**{name: value[rows] for name, value in vars(self).items()})

    @property
    def text_order(self) -> Tensor:
        """Order of the tokens of T: int64 [B, Nt], `PADDING` for padding."""
        return torch.where(self.text_valid, self.order.gather(1, self.text_index), PADDING)

    @property
    def last_text(self) -> Tensor:
        """Index in T of the last text token at or before each column: int64 [B, S]."""
        counts = torch.zeros_like(self.order).scatter_add(1, self.text_index, self.text_valid.long())
        return (counts.cumsum(1) - 1).clamp(min=0)

    def merge(self, visual: Tensor, text: Tensor) -> Tensor:
        """Merges V [B, Nv, D] and T [B, Nt, D] into [B, S, D] in column order; padding columns hold any value."""
        return _take(torch.cat([visual, text], dim=1), self.merge_index)

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Splits [B, S, D] into V and T, the inverse of `merge`; padding of V is zero."""
        return _take(both, self.visual_index) * self.visual_valid[..., None], _take(both, self.text_index)


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the indices of each row's chosen columns, in order, padded to the longest row; and which are valid."""
    counts = chosen.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    index = torch.argsort((~chosen).long(), dim=1, stable=True)[:, :longest]
    return index, torch.arange(longest, device=chosen.device) < counts[:, None]


def _run_ends(chosen: Tensor, order: Tensor) -> Tensor:
    """Returns, for each chosen column, the order of the last column of its contiguous run."""
    follows = torch.nn.functional.pad(chosen[:, 1:], (0, 1))
    ends = torch.where(chosen & ~follows, order, PADDING)
    return ends.flip(1).cummin(1).values.flip(1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class VisorCache(Cache):
    """Keys and values of the tokens so far; `budgets` holds the slots that each sample has on.

    A layer's entry has up to two parts: "joint" for the samples in which it is a self-attention layer over all tokens,
    "text" for the samples in which it attends to text only. Each part holds the rows of its samples, in order. The
    first forward pass fills an empty cache, for any number of samples.

    Args:
        config: configuration of the model that uses the cache.
    """

    def __init__(self, config: VisorConfig):
        super().__init__(layers=[])
        self.slots = config.slots
        self.reset()

    def reset(self) -> None:
        """Clears the cache; the next tokens start a new sequence with newly chosen budgets."""
        self.budgets: Tensor | None = None  # bool [B, slots]; None until decided
        self.order: Tensor | None = None  # int64 [B, S] of all columns; `PADDING` for padding; None while empty
        self.text_order: Tensor | None = None  # int64 [B, Nt], the same for T
        self.parts: dict[tuple[int, str], KeysValues] = {}
        self.visual: dict[int, KeysValues] = {}  # of the cross-attention layers, by their number
        self.visual_columns: Tensor | None = None  # int64 [B, Nv], columns of visual tokens; -1 for padding

    def __len__(self) -> int:
        """Number of layers that hold keys; an empty cache is falsy, like those of transformers."""
        return 1 + max((layer for layer, _ in self.parts), default=-1)

    def __repr__(self) -> str:
        budgets = None if self.budgets is None else self.budgets.int().tolist()
        return f"VisorCache({self.get_seq_length()} columns, budgets={budgets})"

    @property
    def batch_size(self) -> int:
        """Number of samples; -1 while the cache is empty."""
        return -1 if self.order is None else len(self.order)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns so far, pictures and padding included."""
        return 0 if self.order is None else self.order.shape[1]

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Returns (number of columns of a mask for `query_length` new columns, 0).

        Older versions of transformers pass the positions of the new columns instead of their number.
        """
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: the cache has no maximum length."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Returns -1: the cache has no maximum length."""
        return -1

    def extend(self, layout: Layout) -> None:
        """Appends the positions of new columns. Only the first columns of a cache may contain visual tokens."""
        if self.order is None or self.text_order is None:
            self.order, self.text_order = layout.order, layout.text_order
            self.visual_columns = torch.where(layout.visual_valid, layout.visual_index, -1)
            if not self.slots:
                self.budgets = layout.order.new_zeros((len(layout.order), 0), dtype=torch.bool)
        else:
            self.order = torch.cat([self.order, layout.order], dim=1)
            self.text_order = torch.cat([self.text_order, layout.text_order], dim=1)

    @property
    def visual_valid(self) -> Tensor:
        """Which visual tokens are not padding: bool [B, Nv]."""
        assert self.visual_columns is not None, "the cache is empty"
        return self.visual_columns >= 0

    def num_bytes(self) -> int:
        """Returns the bytes of all keys and values."""
        pairs = [*self.parts.values(), *self.visual.values()]
        return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces sample i by sample indices[i]; samples may be reordered, dropped and repeated.

        Args:
            indices: int [new B], or bool [B], True for the samples to keep.
        """
        if self.order is None or self.text_order is None or self.visual_columns is None:
            return
        indices = torch.as_tensor(indices, device=self.order.device)
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long()
        parts = {}
        for (layer, kind), (key, value) in self.parts.items():
            rows = self._rows_of(layer, kind, indices).to(key.device)
            if len(rows) or not len(indices):  # a part that lost all its samples is dropped
                parts[layer, kind] = key[rows], value[rows]
        self.parts = parts
        self.visual = {
            block: (key[indices.to(key.device)], value[indices.to(key.device)])
            for block, (key, value) in self.visual.items()
        }
        self.order, self.text_order = self.order[indices], self.text_order[indices]
        self.visual_columns = self.visual_columns[indices]
        self.budgets = None if self.budgets is None else self.budgets[indices]

    def _rows_of(self, layer: int, kind: str, samples: Tensor) -> Tensor:
        """Returns the rows of a layer's part that belong to `samples`; samples without a row there are left out."""
        other = "text" if kind == "joint" else "joint"
        if (layer, other) not in self.parts or self.budgets is None:
            return samples  # the part holds all samples
        on = self.budgets[:, self.slots[layer]]
        held = on if kind == "joint" else ~on
        return (held.long().cumsum(0) - 1)[samples[held[samples]]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample `repeats` times; copies are adjacent."""
        if self.order is not None:
            samples = torch.arange(len(self.order), device=self.order.device)
            self.batch_select_indices(samples.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces sample i by sample beam_idx[i], for beam search."""
        self.batch_select_indices(beam_idx)

    @property
    def is_croppable(self) -> bool:
        """True: `crop` removes tokens, as assisted decoding needs."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: no layer uses linear attention."""
        return [False] * len(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes text columns from the end.

        Args:
            tokens_to_remove: -n removes n columns, 0 none; a positive number is the number of columns to keep, the
                meaning in older versions of transformers.

        Raises:
            ValueError: a picture's columns would be removed, whose tokens have already attended to each other.
        """
        length = self.get_seq_length()
        keep = max(0, length + tokens_to_remove if tokens_to_remove <= 0 else min(length, tokens_to_remove))
        if keep == length or self.order is None or self.text_order is None or self.visual_columns is None:
            return
        pictures = int(self.visual_columns.max()) + 1 if self.visual_columns.numel() else 0
        if keep < pictures:
            raise ValueError(
                f"crop: {keep} columns would be left, but the last picture ends at {pictures}; a VISOR cache removes"
                " text after its pictures only; `reset()` empties it"
            )
        if keep == 0:
            return self.reset()
        self.order = self.order[:, :keep]
        tokens = (self.order != PADDING).sum(1, keepdim=True)
        text_order = torch.where(self.text_order < tokens, self.text_order, PADDING)
        used = (text_order != PADDING).any(0).nonzero()
        width = int(used.max()) + 1 if len(used) else 0
        self.text_order = text_order[:, :width]
        widths = {"joint": keep, "text": width}
        self.parts = {
            (layer, kind): (key[:, :, : widths[kind]], value[:, :, : widths[kind]])
            for (layer, kind), (key, value) in self.parts.items()
        }

    def update(self, *args, **kwargs):
        """Raises NotImplementedError: the layers of a VISOR model fill the cache themselves."""
        raise NotImplementedError("a VISOR cache is filled by its own model's layers, not by `update`")
