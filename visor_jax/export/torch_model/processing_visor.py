"""Model inputs from PIL pictures and a question, by an exported folder's own files and without torchvision.

In: pictures and questions. Out: `input_ids`, `attention_mask`, `pixel_values`, `image_sizes`, `batch_num_images`, as
transformers' LLaVA-OneVision processor (PIL backend) makes them, in the chat template that the model was trained with.
Chat tokens come from the template only: what looks like one in a question stays plain text.
This file travels inside every export; it needs torch, transformers (which brings tokenizers) and Pillow only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from .configuration_visor import VisorConfig
from .vision_visor import Size, best_pinpoint, shrunk, tile_grid, unpadded

IMAGE_MARKER = "<image>"  # in a question: where a picture stands
FILES = (  # of a folder: all that makes inputs, here and by transformers' own classes
    "processing_visor.py",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class VisorProcessor:
    """Reads config.json, preprocessor_config.json and tokenizer.json of an exported folder, and makes model inputs."""

    def __init__(
        self, config: VisorConfig, tokenizer: Tokenizer, image_mean: Sequence[float], image_std: Sequence[float]
    ):
        self.config, self.tokenizer = config, tokenizer
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.dtype = np.dtype(np.float32)  # of the pixels
        self.files: dict[str, bytes] = {}  # by name, of the folder it was read from
        tokenizer.encode_special_tokens = True  # that is: spell them out when they stand in a text
        added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        self.start_token_id, self.end_token_id = added["<|im_start|>"], added["<|im_end|>"]
        self.pad_token_id = added.get("<|endoftext|>", self.end_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisorProcessor:
        folder = Path(folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor = cls(VisorConfig(**values), tokenizer, settings["image_mean"], settings["image_std"])
        processor.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what it was read from beside a model's `save_pretrained`, which leaves these files out."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def __call__(
        self, images: Image.Image | Sequence[Image.Image], question: str, system: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs of one prompt. `images` may be one picture, several, or none (an empty list)."""
        return self.batch([(images, question)], system)

    def batch(
        self, prompts: Sequence[tuple[Image.Image | Sequence[Image.Image], str]], system: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs of several prompts, (pictures, question) each, padded on the left.

        Args:
            system: text of the system turn; None: the one that the model was trained with, if any.

        Raises:
            ValueError: a question's `<image>` markers and its pictures are not equally many.
            TypeError: a picture is none of PIL's.
        """
        rows, tiles, sizes, counts = [], [], [], []
        for pictures, question in prompts:
            pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise TypeError("images: expected PIL pictures; Image.fromarray makes one of an array")
            own = [(picture.height, picture.width) for picture in pictures]
            rows.append(self.prompt_ids(question, own, system))
            tiles.extend(self.tiles(pictures))
            sizes.extend(own)
            counts.extend([len(pictures)] if pictures else [])
        longest = max(len(row) for row in rows)
        inputs = {
            "input_ids": torch.tensor([[self.pad_token_id] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if not sizes:
            return inputs
        pixels = np.zeros((len(tiles), max(len(own) for own in tiles), *tiles[0].shape[1:]), self.dtype)
        for index, own in enumerate(tiles):
            pixels[index, : len(own)] = own
        return {
            **inputs,
            "pixel_values": torch.from_numpy(pixels),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(counts),
        }

    def prompt_ids(self, question: str, sizes: Sequence[Size], system: str | None = None) -> list[int]:
        """Token ids of one question up to the assistant's header, each picture as its run of placeholders."""
        system = self.config.system_prompt if system is None else system
        pieces = self._place_images(question, len(sizes)).split(IMAGE_MARKER)
        ids = self._turn(f"system\n{system}") if system else []
        ids += [self.start_token_id, *self._encode(f"user\n{pieces[0]}")]
        for size, piece in zip(sizes, pieces[1:], strict=True):
            ids += [self.config.image_token_index] * self.num_visual_tokens(size, len(sizes)) + self._encode(piece)
        ids += [self.end_token_id, *self._encode("\n")]
        return [*ids, self.start_token_id, *self._encode("assistant\n")]

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text of an answer's token ids, up to its end and without special tokens."""
        numbers = [int(number) for number in ids]
        if self.end_token_id in numbers:
            numbers = numbers[: numbers.index(self.end_token_id)]
        return self.tokenizer.decode(numbers, skip_special_tokens=True)

    def num_visual_tokens(self, size: Size, num_images: int = 1) -> int:
        """Visual tokens of a picture of (height, width), in a prompt with `num_images` pictures."""
        side = self.config.patches_per_side
        if num_images != 1 or not self.config.image_grid_pinpoints:
            return side**2 + 1
        rows, columns = tile_grid(size, self.config)
        top, left = unpadded(size, rows * side, columns * side)
        height, width = shrunk(rows * side - 2 * top, columns * side - 2 * left, side, self.config.max_tiles)
        return side**2 + height * (width + 1)

    def tiles(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        """Normalised tiles [n, 3, S, S] of each of one prompt's pictures."""
        tile = self.config.tile_size
        cut = []
        for picture in map(_upright_rgb, pictures):
            if self.config.image_grid_pinpoints and len(pictures) == 1:
                cut.append([_resized(picture, (tile, tile)), *self._crops(picture)])
            elif self.config.image_grid_pinpoints:
                cut.append([_resized(self._squared(picture), (tile, tile))])
            else:
                cut.append([_resized(picture, (tile, tile))])
        return [self._normalised(own) for own in cut]

    def _normalised(self, tiles: Sequence[Image.Image]) -> np.ndarray:
        values = np.stack([np.asarray(tile) for tile in tiles]).astype(self.dtype) / 255
        mean, std = (np.asarray(channels, self.dtype) for channels in (self.image_mean, self.image_std))
        return ((values - mean) / std).transpose(0, 3, 1, 2)

    def _crops(self, picture: Image.Image) -> list[Image.Image]:
        """The picture resized into its best grid, centred on black and cut row by row."""
        tile, size = self.config.tile_size, (picture.height, picture.width)
        height, width = best_pinpoint(size, self.config.image_grid_pinpoints)
        by_height, by_width = height / size[0], width / size[1]
        if by_width < by_height:
            new = min(math.ceil(size[0] * by_width), height), width
        else:
            new = height, min(math.ceil(size[1] * by_height), width)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(_resized(picture, new), ((width - new[1]) // 2, (height - new[0]) // 2))
        corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
        return [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]

    def _squared(self, picture: Image.Image) -> Image.Image:
        """The picture centred on a square in the mean colour."""
        side = max(picture.size)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _turn(self, text: str) -> list[int]:
        return [self.start_token_id, *self._encode(text), self.end_token_id, *self._encode("\n")]

    def _place_images(self, question: str, num_images: int) -> str:
        """The question with one marker per picture; without markers they come first, each on a line of its own."""
        if question.count(IMAGE_MARKER) == 0:
            return f"{IMAGE_MARKER}\n" * num_images + question
        if question.count(IMAGE_MARKER) != num_images:
            raise ValueError(f"question: {question.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, {num_images} pictures")
        if num_images == 1:
            return f"{IMAGE_MARKER}\n{question.replace(IMAGE_MARKER, '').strip()}".strip()
        return question


def _upright_rgb(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says, 16 bits scaled to 8, transparency over white: as pictures were read in training."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.int64).clip(0, 0xFFFF)
        used = max(int(gray.max(initial=0)).bit_length(), 8)  # 12 bits of an X-ray in a 16-bit file fill the range
        return Image.fromarray((gray >> (used - 8)).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _resized(picture: Image.Image, size: Size) -> Image.Image:
    """Pillow's bicubic resize to (height, width)."""
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
