"""Detokenizes incrementally: token ids in, whole characters out.

A character may span several tokens (an emoji has four bytes), and a token's text may depend on the previous one.
Therefore text is returned once it cannot change any more; the concatenated pieces are the decoded answer.
"""

from __future__ import annotations

from visor_jax.data.tokenizer import ChatTokenizer

UNFINISHED = "\ufffd"  # an incomplete character decodes to this


class Characters:
    """Collects tokens and returns the text that they complete."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._recent: list[int] = []  # tokens of the last piece (context), then tokens whose text is pending
        self._context = 0  # number of context tokens
        self._known = ""  # the text of the context

    def add(self, token: int) -> str:
        """Adds a token and returns the text that became final; "" while a character is incomplete."""
        self._recent.append(token)
        text = self._tokenizer.decode(self._recent)
        if text.endswith(UNFINISHED) or len(text) <= len(self._known):
            return ""
        piece = text[len(self._known) :]
        self._recent = self._recent[self._context :]
        self._known = self._tokenizer.decode(self._recent)
        self._context = len(self._recent)
        return piece

    def rest(self) -> str:
        """Returns the pending text at the end of the answer."""
        return self._tokenizer.decode(self._recent)[len(self._known) :]
