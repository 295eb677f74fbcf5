"""Detokenizes incrementally: token ids in, whole characters out.

A character may be spread over several tokens (an emoji is four bytes), and what a token says may depend on the one
before it; so text is handed out as soon as it cannot change any more, and the pieces together are the decoded answer.
"""

from __future__ import annotations

from visor_jax.data.tokenizer import ChatTokenizer

UNFINISHED = "\ufffd"  # what half a character decodes to


class Characters:
    """Collects tokens and hands out the text that they finish."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._recent: list[int] = []  # the tokens of the last piece, as context, and those not yet handed out
        self._context = 0  # how many of them are such context
        self._known = ""  # the text of the context

    def add(self, token: int) -> str:
        """The text that is final now and was not before; often "", while a character is unfinished."""
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
        """What was held back, at the end of the answer."""
        return self._tokenizer.decode(self._recent)[len(self._known) :]
