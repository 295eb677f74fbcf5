"""Reads a tokenizer.json and encodes text with it; text can never produce a chat token.

In: the name of a built-in tokenizer, a tokenizer.json, or a folder that holds one. Out: a `ChatTokenizer`. The
`tokenizers` library reads the file as data, so no code is run; a file that cannot be used raises a `RequestError` that
names it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from visor_jax.config import tokenizer_file
from visor_jax.config.data_fields import BUILT_IN
from visor_jax.data.chat_template import CHAT_TOKENS
from visor_jax.data.tokenizer_checks import check_parts
from visor_jax.errors import RequestError
from visor_jax.files.read_write import MAX_TOKENIZER_BYTES, parse_json, read_regular

_CACHED_TEXTS = 8192  # generated questions repeat; other texts are evicted soon


class ChatTokenizer:
    """A tokenizer with Qwen's chat tokens. It is made from text, so that it can be pickled to data workers.

    Attributes:
      text: the content of its tokenizer.json.
      vocab_size: one more than the highest token id. A model's embedding table may have more rows, never fewer.
      pad_token_id, start_token_id, end_token_id, image_token_id: ids of `CHAT_TOKENS`.
    """

    def __init__(self, text: str, name: str = "tokenizer.json") -> None:
        """Parses `text`, the content of a tokenizer.json; `name` names it in errors (RequestError)."""
        self.text, self.name = text, name
        self._tokenizer = _parse(text, name)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = [self.special(token) for token in CHAT_TOKENS]
        self.pad_token_id, self.start_token_id, self.end_token_id, self.image_token_id = ids
        self._encode = functools.lru_cache(_CACHED_TEXTS)(self._encode_uncached)

    def __reduce__(self) -> tuple:
        return ChatTokenizer, (self.text, self.name)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text` as plain text; the spelling of a special token is encoded as text too."""
        return list(self._encode(text))

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Returns the text of `ids`, without special tokens unless `keep_special`."""
        with _panics_refused(self.name):
            return self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def special(self, token: str) -> int:
        """Returns the id of the added token `token`; raises RequestError if the tokenizer has none."""
        added = {item.content: number for number, item in self._tokenizer.get_added_tokens_decoder().items()}
        if token not in added:
            raise RequestError(f"{self.name}: no added token {token!r}; it has {', '.join(sorted(added)) or 'none'}")
        return added[token]

    def single(self, text: str) -> int:
        """Returns the id of `text`, an added token or one token of plain text; raises RequestError if it is several."""
        added = {item.content: number for number, item in self._tokenizer.get_added_tokens_decoder().items()}
        ids = [added[text]] if text in added else self._encode(text)
        if len(ids) != 1:
            raise RequestError(f"{self.name}: {text!r} is {len(ids)} tokens, expected one")
        return ids[0]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        with _panics_refused(self.name):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Loads a built-in tokenizer (by name), a tokenizer.json, or a folder with one.

    Raises:
      RequestError: the file does not exist, is not a tokenizer, or lacks one of `CHAT_TOKENS`.
    """
    file = tokenizer_file(str(path))
    if file.is_dir():
        file = file / "tokenizer.json"
    try:
        text = read_regular(file, MAX_TOKENIZER_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(
            f"tokenizer: no file {file}; expected a tokenizer.json or {' or '.join(map(repr, BUILT_IN))}"
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"tokenizer: cannot read {file}: {error}") from None
    except OSError as error:
        raise RequestError(f"tokenizer: cannot read {file}: {error.strerror or error}") from None
    return ChatTokenizer(text, str(file))


def _parse(text: str, name: str) -> Tokenizer:
    """Returns a tokenizer that recognizes no added token in text; raises RequestError unless `text` defines one."""
    try:
        content = parse_json(text)
        chat_tokens = [token for token in content["added_tokens"] if token["content"] in CHAT_TOKENS]
        if not all(token["special"] for token in chat_tokens):
            for token in chat_tokens:
                token["special"] = True
            text = json.dumps(content)
    except (ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{name}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    check_parts(content, name)
    try:
        with _panics_refused(name):
            tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{name}: not a tokenizer.json ({type(error).__name__}: {str(error)[:300]})") from None
    tokenizer.encode_special_tokens = True  # encodes their spelling as text instead of recognizing them
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _panics_refused(name: str) -> Iterator[None]:
    """Raises RequestError if the library panics. PanicException is not an Exception and cannot be imported."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"{name}: the tokenizers library cannot run it: {str(error)[:300]}") from None
