"""transformers' tests of models and of generation, run on the exported module (see conftest.py)."""

import importlib
import unittest
from typing import Any

import pytest
import torch

from visor_jax.export.torch_model import VisorConfig, VisorForConditionalGeneration
from visor_jax.export.torch_model.cache_visor import VisorCache
from visor_jax.export.torch_model.modeling_visor import VisorModel

try:
    common = importlib.import_module("tests.test_modeling_common")
    generation = importlib.import_module("tests.generation.test_utils")
    configuration = importlib.import_module("tests.test_configuration_common")
except ImportError as error:
    reason = f"needs TRANSFORMERS_TESTS=DIR, a checkout of transformers whose tests fit the one installed: {error}"
    pytest.skip(reason, allow_module_level=True)

IMAGE, PADDING, VOCABULARY = 1, 0, 99
PLACEHOLDERS = 10  # of a square picture: 2 x 2 patches of the base tile, and two rows of one crop with their newlines
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 580,
    "pad_token_id": PADDING,
    "bos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vision_use_head": False,
}


class Tester:
    """The mixins' interface to a model: sizes, a configuration, and inputs of three prompts with one picture each."""

    batch_size, seq_length, is_training = 3, 7 + PLACEHOLDERS, True
    hidden_size, num_attention_heads = TEXT["hidden_size"], TEXT["num_attention_heads"]
    num_hidden_layers, vocab_size, pad_token_id = TEXT["num_hidden_layers"], VOCABULARY, PADDING
    num_channels, image_size, patch_size = 3, VISION["image_size"], VISION["patch_size"]
    text_config, vision_config = TEXT, VISION

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> VisorConfig:
        return VisorConfig(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 16]],
            policy_hidden_size=16,
            policy_max_budgets=4,
            viable_budgets=["0b0", "0b1"],
            has_policy=True,
            pad_token_id=PADDING,
            bos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VisorConfig, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], VOCABULARY - 2) + 2
        ids[:, :PLACEHOLDERS] = IMAGE
        return self.get_config(), {
            "pixel_values": common.floats_tensor([self.batch_size, 2, 3, self.image_size, self.image_size]),
            "image_sizes": torch.tensor([[45, 45]] * self.batch_size),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


def class_names(mapping: dict[str, str]) -> list[str]:
    """Adds our classes to the tables in which the mixins look up a class's task."""
    ours = {
        id(common.MODEL_MAPPING_NAMES): ["VisorModel"],
        id(common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES): ["VisorForConditionalGeneration"],
    }
    return [*stock_class_names(mapping), *ours.get(id(mapping), [])]


stock_class_names, common.get_values = common.get_values, class_names


class TestModel(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VisorModel, VisorForConditionalGeneration)
    pipeline_model_mapping = {"image-text-to-text": VisorForConditionalGeneration}  # noqa: RUF012
    has_attentions = False  # attention weights are refused
    skip_test_image_features_output_shape = True  # one row per tile, not per picture
    test_all_params_have_gradient = False  # the policy has none: it is trained on budgets' labels, not on answers
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.config_tester = configuration.ConfigTester(
            self, config_class=VisorConfig, has_text_modality=False, common_properties=["image_token_index"]
        )

    def _check_caches_are_equal(self, one: VisorCache, other: VisorCache) -> None:
        assert torch.equal(one.order, other.order) and torch.equal(one.budgets, other.budgets)
        assert one.parts.keys() == other.parts.keys() and one.visual.keys() == other.visual.keys()
        for mine, theirs in ((one.parts, other.parts), (one.visual, other.visual)):
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key])

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
