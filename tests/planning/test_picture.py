"""The cost of a picture: savings are relative to the dense plan on all visual tokens, also of reduced ones."""

from __future__ import annotations

import dataclasses

import pytest

from visor_jax.architecture import Architecture, DroppingArchitecture, ReductionArchitecture
from visor_jax.config import architecture, load_config
from visor_jax.cost import decoder_flops, dense_decoder_flops, reduction_flops, visual_flops
from visor_jax.planning.picture import lines, picture_costs

PAGE, TEXT = (2200, 1700), 60


def page_model(**changes) -> Architecture:
    config = load_config("llava_ov_0p5b", ["model.text.vocab_size=152000"])
    return dataclasses.replace(architecture(config), **changes)


def test_reduced_tokens_save_as_published_with_multi_head_cross_attention() -> None:
    arch = page_model()
    arch = dataclasses.replace(arch, cross=dataclasses.replace(arch.cross, num_kv_heads=arch.text.num_heads))
    costs = picture_costs(arch, PAGE, TEXT)
    assert costs["visual_tokens"] == 7353
    dense, two = costs["decoder_gflops"]["dense"], "0b11000000"
    savings = {name: dense / of["decoder_gflops"][two] for name, of in {"all": costs, **costs["reduced"]}.items()}
    assert savings == pytest.approx(
        {"all": 8.7, "packing 2": 17.9, "packing 4": 34.2, "visionzip": 35.4, "vispruner": 35.4}, abs=0.06
    )
    text = list(lines(costs, arch, PAGE, TEXT))
    assert text[0].startswith("31 tiles, 7353 visual tokens") and "end to end" in text[-8]
    assert text[-4].split()[:2] == ["packing", "2"]
    assert next(line for line in text if line.startswith("  vispruner")).split()[4] == "35.4x"


def test_a_configured_reduction_is_compared_with_all_tokens() -> None:
    arch = page_model(reduction=ReductionArchitecture("divprune", 0.25))
    costs = picture_costs(arch, PAGE, TEXT)
    assert "reduced" not in costs
    kept = costs["visual_tokens"]
    assert costs["reduction_gflops"] == reduction_flops(arch, 31, kept) / 1e9
    decoder = costs["decoder_gflops"]
    assert decoder["dense"] == dense_decoder_flops(arch, 7353, TEXT) / 1e9
    assert decoder["dense, divprune"] == dense_decoder_flops(arch, kept, TEXT) / 1e9
    last = list(lines(costs, arch, PAGE, TEXT))[-1]
    assert last.split()[0] == "dense" and last.split()[-1] == "1.00x"
    of_full = next(line for line in lines(costs, arch, PAGE, TEXT) if line.split()[0] == "full")
    whole = decoder["dense"] + visual_flops(page_model(), 31, 7353) / 1e9
    assert of_full.endswith(f"{whole / (decoder['full'] + costs['tower_gflops']):5.2f}x")


def test_dropping_is_a_row_of_a_dense_plan() -> None:
    arch = page_model(plan="dense", dropping=DroppingArchitecture("fastv", (2,), (0.5,)))
    decoder = picture_costs(arch, PAGE, TEXT)["decoder_gflops"]
    assert [*decoder] == ["dense, fastv", "dense"]
    assert decoder["dense, fastv"] == decoder_flops(arch, (), 7353, TEXT) / 1e9 < 0.5 * decoder["dense"]
