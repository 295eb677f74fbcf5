"""Builds the tokenizer of the data set: `python -m visor_jax.data.almanac.build_tokenizer [FOLDER]`.

In: the words of the tables and the wording of the questions. Out: FOLDER (default: the one in the package) with
tokenizer.json and tokenizer_config.json. The files are deterministic.

Byte-level BPE in which a piece that the vocabulary holds is one token (`ignore_merges`): the vocabulary has all 256
bytes, so it can encode any text, and whole pieces; it needs no merges. The splitting rule keeps capitalized words and
digits apart from the space before them, and gives that space to a word in lower case before it: "Value of Brazil?" is
"Value", " of ", "Brazil", "?". So every word of a table and every digit has one token, wherever it stands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from visor_jax.config.data_fields import ASSETS
from visor_jax.data.almanac.questions import TASKS
from visor_jax.data.almanac.words import BARS, NONE, PAPERS, content_words, units
from visor_jax.data.chat_template import ASSISTANT, CHAT_TOKENS, SYSTEM, USER, fill, header

MAX_VOCABULARY = 700
HEADERS = tuple(header(role) for role in (SYSTEM, USER, ASSISTANT))
SPLIT = (
    "|".join(HEADERS).replace("\n", r"\n")
    + r"| ?\p{Ll}+ (?=[\p{Lu}\p{N}])| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\n|[^\S\n]+(?=\S)|\s+"
)
CHAT_TEMPLATE = fill(
    "{% for message in messages %}"
    "{{ '$start' + message['role'] + '$newline' + message['content'] + '$end' + '$newline' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '$start$assistant$newline' }}{% endif %}"
)


def splitter() -> pre_tokenizers.PreTokenizer:
    """Returns the splitting rule; its pieces are written in the alphabet of bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def texts() -> Iterator[str]:
    """Yields texts that hold every piece that must be one token, in a fixed order."""
    yield from HEADERS
    for word in content_words():
        yield word
    for word in (*PAPERS, *BARS, *units(), NONE):
        yield word
    for unit in units():
        yield f"Life in {unit}"
    for task in TASKS.values():
        for phrasing in task.phrasings:
            for where in ("", " in Rome"):
                yield phrasing.format(a="Rome", b="Rome", c="Rome", d="Rome", v="12", k="1", where=where)
            for color in BARS:
                yield phrasing.format(a="Rome", b=color, c="Rome", d="Rome", v="12", k="1", where="")
        yield from task.answers
    yield "Rome 1 Rome"


def build() -> Tokenizer:
    """Builds the tokenizer.

    Raises:
      ValueError: the vocabulary is larger than `MAX_VOCABULARY`.
    """
    split = splitter()
    pieces: dict[str, None] = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for text in texts():
        for piece, _ in split.pre_tokenize_str(text):
            pieces.setdefault(piece)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) + len(CHAT_TOKENS) > MAX_VOCABULARY:
        raise ValueError(f"{len(vocabulary)} pieces; expected at most {MAX_VOCABULARY - len(CHAT_TOKENS)}")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    return tokenizer


def config(tokenizer: Tokenizer) -> dict:
    """Returns the content of tokenizer_config.json, which transformers' `AutoTokenizer` needs to load the folder."""
    end_of_text, start, end, image = CHAT_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in CHAT_TOKENS}
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": [start, end, image],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "image_token": image,
        "model_max_length": 32768,
        "pad_token": end_of_text,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write(folder: Path) -> Tokenizer:
    """Writes the tokenizer's files into `folder` and returns the tokenizer."""
    tokenizer = build()
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": config(tokenizer)}
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return tokenizer


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "almanac"
    print(f"{target}: {write(target).get_vocab_size()} tokens")
