"""Defines the chat template of trained models, LLaVA-NeXT's qwen_1_5. All code that reads or writes it uses this file.

    <|im_start|>system\\nS<|im_end|>\\n          only if there is a system text
    <|im_start|>user\\n<image>\\nQ<|im_end|>\\n
    <|im_start|>assistant\\nA<|im_end|>\\n       the last two once per turn

In: roles and texts. Out: the pieces of a turn, and the template in Jinja for tools that render prompts. `chat` encodes
conversations with these pieces. An exported folder holds a copy of this file, template_visor.py, which its
chat_visor.py uses in the same way; so this file imports only the standard library.
"""

from __future__ import annotations

import string

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE_MARKER = "<image>"  # marks one picture in a text; in token ids, the placeholder of its visual tokens
CHAT_TOKENS = (PAD, START, END, IMAGE_MARKER)  # required in every tokenizer; Qwen's order of ids
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
NEWLINE = "\n"  # between header and text, after END, and after a picture in front of a text

# Pictures come first, one per line, unless <image> in the text gives their positions; a single one always comes first.
_JINJA = """\
{%- if messages[0]['role'] != '$system' and $system_text -%}
{{- '$start$system$newline' + $system_text + '$end$newline' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- endfor -%}
{%- if '$image' not in turn.text -%}
{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
{%- set turn.text = '$image$newline' + turn.text -%}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{%- if message['role'] == '$user' and turn.text.count('$image') == 1 -%}
{%- set turn.text = ('$image$newline' + turn.text.replace('$image', '').strip()).strip() -%}
{%- endif -%}
{%- if message['role'] == '$assistant' -%}{%- set turn.text = turn.text.strip() -%}{%- endif -%}
{%- if message['role'] != '$system' or turn.text -%}
{{- '$start' + message['role'] + '$newline' + turn.text + '$end$newline' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '$start$assistant$newline' -}}{%- endif -%}
"""


def header(role: str) -> str:
    """Returns the text between START and a turn's text."""
    return f"{role}{NEWLINE}"


def images_before(text: str, num_images: int) -> str:
    """Returns `text` with `num_images` markers in front, each on a separate line."""
    return f"{IMAGE_MARKER}{NEWLINE}" * num_images + text


def image_first(text: str) -> str:
    """Returns `text`, which holds one marker, with the marker on a separate first line; strips outer white space."""
    return images_before(text.replace(IMAGE_MARKER, "").strip(), 1).strip()


def fill(jinja: str, **values: str) -> str:
    """Returns a Jinja text with `$start`, `$end`, `$image`, `$newline`, `$system`, `$user` and `$assistant` filled in.

    The template puts the first four in quotes. `values` are further names, substituted unchanged.
    """
    roles = {role: role for role in (SYSTEM, USER, ASSISTANT)}
    newline = NEWLINE.replace("\n", "\\n")
    return string.Template(jinja).substitute(roles, start=START, end=END, image=IMAGE_MARKER, newline=newline, **values)


def write_jinja(system_literal: str) -> str:
    """Returns the template in Jinja; `system_literal` is the trained system text as a quoted Jinja string."""
    return fill(_JINJA, system_text=system_literal)
