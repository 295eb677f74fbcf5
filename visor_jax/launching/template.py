"""Renders the templates of scripts and manifests in `templates/`, which are package data."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import jinja2


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("visor_jax.launching", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # no HTML; the filter `sh` quotes shell words
    )
    environment.filters["sh"] = shlex.quote
    environment.filters["sh_join"] = shlex.join
    return environment


def render(name: str, **values: Any) -> str:
    """Returns the text of `templates/NAME`; an undefined name in a template raises.

    The filters `sh` and `sh_join` quote one word and a list of words for a shell.
    """
    return _environment().get_template(name).render(**values)
