"""Builds the tokenizer of the `glyphs` data set: `python -m visor_jax.data.glyphs.build_tokenizer [FOLDER]`.

In: the wording of the data set (`words.py`). Out: FOLDER (default: the one in the package) with tokenizer.json and
tokenizer_config.json, in the layout of Qwen2's: byte-level BPE over NFC text with Qwen2's splitting rule, chat tokens
after the vocabulary, the qwen_1_5 chat template. The files are deterministic.

The vocabulary holds all 256 bytes, so it can encode any text, and the words of the data set: every word of a question,
an answer or a name is one token, both at the start of a text and after a space.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from visor_jax.config.data_fields import ASSETS
from visor_jax.data.chat_template import ASSISTANT, CHAT_TOKENS, SYSTEM, USER, fill
from visor_jax.data.glyphs.render import ARROWS, BACKGROUNDS, COLORS, DIGITS, EMPTY, LETTERS, SHAPES
from visor_jax.data.glyphs.words import PHRASINGS

MAX_VOCABULARY = 512
ROLES = (SYSTEM, USER, ASSISTANT)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = fill(
    "{% for message in messages %}"
    "{{ '$start' + message['role'] + '$newline' + message['content'] + '$end' + '$newline' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '$start$assistant$newline' }}{% endif %}"
)


def corpus() -> list[str]:
    """Returns the training texts: every word that must become one token, at a text's start and after a space."""
    words = {*LETTERS, *DIGITS, *SHAPES, *ARROWS, *COLORS, *BACKGROUNDS, EMPTY, *ROLES}
    for question, answer in (phrasing for phrasings in PHRASINGS.values() for phrasing in phrasings):
        words.update(re.findall("[A-Za-z]+", re.sub("{.*?}", " ", f"{question} {answer}")))
    return [form for word in sorted(words) for form in (word, " " + word)]


def build() -> Tokenizer:
    """Trains the tokenizer until no pair in the corpus is left to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(CHAT_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT_TOKENS])
    return tokenizer


def config(tokenizer: Tokenizer) -> dict:
    """Returns the content of tokenizer_config.json, which transformers' `AutoTokenizer` needs to load the folder."""
    end_of_text, start, end, image = CHAT_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in CHAT_TOKENS}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [start, end, image],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "errors": "replace",
        "image_token": image,
        "model_max_length": 32768,
        "pad_token": end_of_text,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
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
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "glyphs"
    print(f"{target}: {write(target).get_vocab_size()} tokens")
