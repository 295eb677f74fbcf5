"""Makes model inputs from pictures and a question, with an exported folder's files and without torchvision.

In: pictures and questions, messages, or prompts that a chat template rendered. Out: `input_ids`, `attention_mask`,
`pixel_values`, `image_sizes`, `batch_num_images`, as from transformers' LLaVA-OneVision processor (PIL backend), in the
chat template that the model was trained with. `AutoProcessor` and pipelines load it (`trust_remote_code=True`).
Every export contains this file; it needs torch, transformers (which brings tokenizers) and Pillow only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file

from .chat_visor import ChatEncoder, Encoded, Message, place_images, read_message
from .configuration_visor import VisorConfig
from .template_visor import IMAGE_MARKER
from .tiles_visor import Tiler, is_picture, open_picture
from .vision_visor import Size, shrunk, tile_grid, unpadded

NEEDED = ("config.json", "preprocessor_config.json", "tokenizer.json")
FILES = (  # all files of a folder that this processor or transformers' classes need
    "processing_visor.py",
    "chat_visor.py",
    "template_visor.py",
    "tiles_visor.py",
    "configuration_visor.py",
    "vision_visor.py",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
CALL_ARGUMENTS = ("padding", "padding_side", "max_length", "truncation", "return_tensors")


class VisorProcessor(ProcessorMixin):
    """Reads config.json, preprocessor_config.json and the tokenizer's files of an exported folder; makes model inputs.

    Attributes:
        config: the model's configuration.
        tokenizer: a tokenizer of transformers. It encodes chat tokens in a text as special tokens; this processor's
            methods encode them as plain text, except in rendered prompts (`text=`).
        dtype: numpy dtype of the pixels.
    """

    def __init__(
        self,
        config: VisorConfig,
        tokenizer: PreTrainedTokenizerFast,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        files: Mapping[str, bytes] | None = None,
        standardize: bool = False,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.files = dict(files or {})  # contents by name, of the folder that it was read from
        self.chat_template: Any = tokenizer.chat_template
        self.image_token, self.image_token_id = IMAGE_MARKER, config.image_token_index
        text = self.files.get("tokenizer.json", b"").decode("utf-8") or tokenizer.backend_tokenizer.to_str()
        self.chat = ChatEncoder(text, config.image_token_index)
        self.tiler = Tiler(config, image_mean, image_std, standardize)
        self.dtype = np.dtype(np.float32)
        self.start_token_id, self.end_token_id, self.pad_token_id = (
            self.chat.start_id,
            self.chat.end_id,
            self.chat.pad_id,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> VisorProcessor:
        """Loads a folder, or a repository of the hub; `kwargs` are those of transformers (`revision`, `token`, ...)."""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        files = {}
        for name in dict.fromkeys((*NEEDED, *FILES)):
            path = cached_file(
                pretrained_model_name_or_path, name, **hub, _raise_exceptions_for_missing_entries=name in NEEDED
            )
            if path is not None:
                files[name] = Path(path).read_bytes()
        settings = json.loads(files["preprocessor_config.json"])
        config = VisorConfig(**json.loads(files["config.json"]))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **hub)
        standardize = settings.get("standardize", False)
        return cls(config, tokenizer, settings["image_mean"], settings["image_std"], files, standardize)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes the files that it was read from, which a model's `save_pretrained` does not write.

        config.json is written only if the folder has none. Returns the paths of the files.

        Raises:
            ValueError: `push_to_hub` is set, which is not supported.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(self.files)
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template.encode("utf-8")
        if (folder / "config.json").exists():
            files.pop("config.json", None)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if push_to_hub:
            raise ValueError("push_to_hub: upload the folder with huggingface_hub.upload_folder")
        return [str(folder / name) for name in files]

    # --- making inputs ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        question: str | None = None,
        system: str | None = None,
        *,
        text: str | Sequence[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Returns the inputs of one question, or, with `text=`, of rendered prompts.

        Args:
            images: one picture, several, or none (None or an empty list). With a list of prompts: one list per prompt,
                or one list for all, which the markers in the prompts divide. A picture is a PIL picture, a path, a URL,
                encoded bytes or a file of them, base64 text, or a uint8 array [H, W, 3].
            question: the question, without the chat template, which is added.
            system: text of the system turn; None: the one that the model was trained with, if any.
            text: a prompt from `apply_chat_template(tokenize=False)`, or a list of such prompts.
            kwargs: `padding_side` ("left" or "right"; default: the tokenizer's), `max_length` together with
                `padding="max_length"`, `return_tensors` ("pt" or "np").

        Raises:
            ValueError: the numbers of markers and pictures differ, or an argument's value is not supported.
            TypeError: a picture has another type, or an argument is unknown.
        """
        if (question is None) == (text is None):
            raise ValueError("expected either question=, to which the template is added, or text=, a rendered prompt")
        if question is not None:
            return self.batch([(images, question)], system, **kwargs)
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures = [[open_picture(source) for source in sources] for sources in _divided(images, texts)]
        rows = [
            self.chat.rendered(prompt, self._lengths(of_prompt))
            for prompt, of_prompt in zip(texts, pictures, strict=True)
        ]
        return self._inputs(rows, pictures, **kwargs)

    def batch(self, prompts: Sequence[tuple[Any, str]], system: str | None = None, **kwargs) -> BatchFeature:
        """Returns the inputs of several prompts, (pictures, question) each; other arguments as of `__call__`."""
        pictures = [[open_picture(source) for source in _listed(images)] for images, _ in prompts]
        rows = [
            self.prompt_ids(question, [(picture.height, picture.width) for picture in of_prompt], system)
            for of_prompt, (_, question) in zip(pictures, prompts, strict=True)
        ]
        return self._inputs(rows, pictures, **kwargs)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        """Renders messages as a prompt, or with `tokenize=True` as model inputs, like transformers.

        A message's `content` is a text or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image":
        PICTURE}` (or "url", "path", "base64"; or OpenAI's "image_url"). Pictures are placed before the text, one per
        line, or where the text has `<image>`. With `tokenize=True`, chat tokens in a message's text are encoded as
        plain text.

        Returns:
            A text, or a list of texts for a list of conversations. With `tokenize=True`: `input_ids`, or with
            `return_dict=True` all inputs (with `return_assistant_tokens_mask` also `assistant_masks`, 1 for tokens of
            the assistant's answers).

        Raises:
            ValueError: the numbers of markers and pictures differ, or a part is neither text nor picture.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message: not possible together with add_generation_prompt")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize or chat_template not in (None, self.chat_template):
            parent: Any = super()
            return parent.apply_chat_template(
                conversation,
                chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **({} if return_tensors is None else {"return_tensors": return_tensors}),
                **({} if processor_kwargs is None else {"processor_kwargs": processor_kwargs}),
                **options,
                **kwargs,
            )
        given = {**kwargs, **(processor_kwargs or {}), "return_tensors": return_tensors}
        images = given.get("images")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if several else [conversation]
        separate = list(images) if several and images is not None else [images] * len(conversations)
        encoded, pictures = [], []
        for messages, separate_images in zip(conversations, separate, strict=True):
            turns = [read_message(message) for message in messages]
            opened = [open_picture(source) for source in _sources(turns, _listed(separate_images))]
            encoded.append(self.chat.conversation(turns, self._lengths(opened), self.config.system_prompt, **options))
            pictures.append(opened)
        inputs = self._inputs(encoded, pictures, **{name: given[name] for name in CALL_ARGUMENTS if name in given})
        if not return_assistant_tokens_mask:
            inputs.pop("assistant_masks")
        return inputs if return_dict else inputs["input_ids"]

    def prompt_ids(self, question: str, sizes: Sequence[Size], system: str | None = None) -> list[int]:
        """Returns the token ids of one question with the assistant's header, each picture as a run of placeholders."""
        system = self.config.system_prompt if system is None else system
        lengths = [self.num_visual_tokens(size, len(sizes)) for size in sizes]
        message = Message("user", place_images(question, len(sizes)), ())
        return self.chat.conversation([message], lengths, system, add_generation_prompt=True).ids

    def num_visual_tokens(self, size: Size, num_images: int = 1) -> int:
        """Returns the number of visual tokens of an upright picture (height, width) in a prompt of `num_images`."""
        side = self.config.patches_per_side
        if num_images != 1 or not self.config.image_grid_pinpoints:
            return side**2 + 1
        rows, columns = tile_grid(size, self.config)
        top, left = unpadded(size, rows * side, columns * side)
        height, width = shrunk(rows * side - 2 * top, columns * side - 2 * left, side, self.config.max_tiles)
        return side**2 + height * (width + 1)

    def tiles(self, pictures: Sequence[Any]) -> list[np.ndarray]:
        """Returns the normalized tiles [n, 3, S, S] of each picture of one prompt."""
        return self.tiler([open_picture(picture) for picture in pictures], self.dtype)

    def _lengths(self, pictures: Sequence[Image.Image]) -> list[int]:
        return [self.num_visual_tokens((picture.height, picture.width), len(pictures)) for picture in pictures]

    def _place_images(self, question: str, num_images: int) -> str:
        return place_images(question, num_images)

    def _inputs(
        self,
        rows: Sequence[list[int] | Encoded],
        pictures: Sequence[Sequence[Image.Image]],
        *,
        padding: Any = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        truncation: Any = None,
        return_tensors: str | None = "pt",
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        **unknown,
    ) -> BatchFeature:
        """Returns token ids and pictures of several prompts as one padded batch."""
        unknown = {name for name, value in unknown.items() if value} - {"add_special_tokens", "device"}
        if unknown:
            raise TypeError(f"unexpected arguments {', '.join(sorted(unknown))}")
        if truncation:
            raise ValueError("truncation: not possible, it would cut a picture's placeholders; shorten the text")
        for name, value in (("videos", videos), ("audio", audio), ("audios", audios)):
            if value is not None and len(value):
                raise ValueError(f"{name}: this model reads pictures and text only")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors: {return_tensors!r}; expected 'pt' or 'np'")
        encoded = [row if isinstance(row, Encoded) else Encoded(row, []) for row in rows]
        length = max(len(row.ids) for row in encoded)
        if padding == "max_length" and max_length is not None:
            if max_length < length:
                raise ValueError(f"max_length: {max_length}; the longest prompt has {length} tokens")
            length = max_length
        right = (padding_side or self.tokenizer.padding_side) == "right"
        missing = [length - len(row.ids) for row in encoded]

        def padded(values: Sequence[Sequence[int | bool]], fill: int) -> np.ndarray:
            fills = [[fill] * count for count in missing]
            sides = zip(values, fills, strict=True) if right else zip(fills, values, strict=True)
            return np.array([[*first, *last] for first, last in sides], np.int64)

        data = {
            "input_ids": padded([row.ids for row in encoded], self.pad_token_id),
            "attention_mask": padded([[1] * len(row.ids) for row in encoded], 0),
        }
        if all(row.is_answer for row in encoded):
            data["assistant_masks"] = padded([row.is_answer for row in encoded], 0)
        data.update(self._pixels(pictures))
        if return_tensors != "np":
            return BatchFeature({name: torch.from_numpy(value) for name, value in data.items()})
        return BatchFeature(data)

    def _pixels(self, pictures: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """Returns the inputs that hold pictures; empty if no prompt has a picture."""
        tiles = [of_picture for of_prompt in pictures for of_picture in self.tiler(of_prompt, self.dtype)]
        if not tiles:
            return {}
        pixels = np.zeros((len(tiles), max(map(len, tiles)), *tiles[0].shape[1:]), self.dtype)
        for index, of_picture in enumerate(tiles):
            pixels[index, : len(of_picture)] = of_picture
        return {
            "pixel_values": pixels,
            "image_sizes": np.array([(picture.height, picture.width) for images in pictures for picture in images]),
            "batch_num_images": np.array([len(of_prompt) for of_prompt in pictures if of_prompt]),
        }

    # --- the rest of transformers' interface --------------------------------------------------------------------------

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs) -> Any:
        """Returns the text of an answer's token ids, up to its end and without special tokens.

        Several answers give a list of texts. With `skip_special_tokens=False` or `kwargs`, calls the tokenizer's
        `decode`.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not skip_special_tokens or kwargs:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if isinstance(ids, Sequence) and ids and isinstance(ids[0], Sequence):
            return [self.chat.decode(answer) for answer in ids]
        return self.chat.decode([ids] if isinstance(ids, int) else ids)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes", "batch_num_images"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of processor_config.json."""
        return json.loads(self.files.get("processor_config.json", b"{}"))


def _listed(images: Any) -> list[Any]:
    """Returns the pictures of one prompt (one, several or None) as a list."""
    if images is None:
        return []
    return [images] if is_picture(images) else list(images)


def _divided(images: Any, texts: Sequence[str]) -> list[list[Any]]:
    """Returns the pictures of each prompt, from one list per prompt or one list for all."""
    listed = _listed(images)
    if any(isinstance(entry, list | tuple) for entry in listed):
        if len(listed) != len(texts):
            raise ValueError(f"images: lists for {len(listed)} prompts; text has {len(texts)}")
        return [_listed(of_prompt) for of_prompt in listed]
    counts = [len(listed)] if len(texts) == 1 else [text.count(IMAGE_MARKER) for text in texts]
    if sum(counts) != len(listed):
        raise ValueError(f"images: {len(listed)} pictures for {sum(counts)} {IMAGE_MARKER} markers in text")
    ends = np.cumsum(counts).tolist()
    return [listed[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _sources(turns: Sequence[Message], separate: list[Any]) -> list[Any]:
    """Returns the sources of a conversation's pictures; those without one in the messages come from `separate`."""
    rest, sources = iter(separate), []
    for source in (source for turn in turns for source in turn.sources):
        sources.append(next(rest, None) if source is None else source)
    if (unused := list(rest)) or any(source is None for source in sources):
        given = sum(source is not None for source in sources) + len(unused)
        raise ValueError(f"images: {given} pictures for {len(sources)} places in the messages")
    return sources
