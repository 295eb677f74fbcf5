"""The chat template's pieces, for chat_visor.py: those of `visor_jax.data.chat_template`.

An exported folder holds that file itself under this file's name, so nothing in it imports visor_jax.
"""

from visor_jax.data.chat_template import (
    ASSISTANT,
    CHAT_TOKENS,
    END,
    IMAGE_MARKER,
    NEWLINE,
    PAD,
    START,
    SYSTEM,
    USER,
    header,
    image_first,
    images_before,
)

__all__ = [
    "ASSISTANT",
    "CHAT_TOKENS",
    "END",
    "IMAGE_MARKER",
    "NEWLINE",
    "PAD",
    "START",
    "SYSTEM",
    "USER",
    "header",
    "image_first",
    "images_before",
]
