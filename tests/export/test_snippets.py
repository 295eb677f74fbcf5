"""The code in docs/pytorch.md and in the model card runs unchanged on an exported folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import visor_jax
from tests.doc_pages import blocks
from visor_jax import testing
from visor_jax.export.model_card import About, write_card
from visor_jax.export.parity import Comparison, Parity

DOCS = Path(visor_jax.__file__).parents[1] / "docs"
PROVEN = Parity(1e-5, [Comparison("p", "full", "full", 0.0, True)])


def snippets(text: str) -> list[str]:
    return [block.text for block in blocks(text, "python")]


@pytest.fixture
def run(visor_folder, tmp_path, monkeypatch):
    """Returns a function that executes snippets in order in a folder with photo.png; DIR is the exported folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(testing.random_picture(20, 33)).save("photo.png")
    names: dict[str, Any] = {"DIR": str(visor_folder), "torch": torch}

    def execute(*sources: str) -> dict[str, Any]:
        for source in sources:
            exec(compile(source, "snippet", "exec"), names)
        return names

    return execute


def test_the_model_cards_snippets_run(jax_model, tmp_path, run, capsys):
    write_card(tmp_path / "README.md", jax_model, PROVEN, About(), stage="policy", dtype="float32")
    sources_found = snippets((tmp_path / "README.md").read_text())
    assert len(sources_found) == 3
    names = run(*sources_found)
    assert "generated_text" in capsys.readouterr().out and names["tokens"].shape[0] == 1


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])  # the second snippet exports programs
def test_the_documents_snippets_run(run, count):
    sources_found = snippets((DOCS / "pytorch.md").read_text(encoding="utf-8"))
    assert len(sources_found) == 2
    names = run(*sources_found[:count])
    assert names["ask"].task == "image-text-to-text"
    if count == 2:
        assert names["logits"].shape[:2] == (1, 1)
