"""Re-exports the chat template's parts from `visor_jax.data.chat_template` for chat_visor.py.

An exported folder contains that file itself under this file's name, so no file in the folder imports visor_jax.
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
