"""transformers' tests of processors, run on the processor of an exported folder (see conftest.py)."""

import importlib
import shutil
import tempfile
import unittest
from pathlib import Path

import pytest

from visor_jax import testing
from visor_jax.budget import all_subsets
from visor_jax.export import torch_export
from visor_jax.export.torch_model import VisorProcessor
from visor_jax.loading import Visor

try:
    common = importlib.import_module("tests.test_processing_common")
except ImportError as error:
    reason = f"needs TRANSFORMERS_TESTS=DIR, a checkout of transformers whose tests fit the one installed: {error}"
    pytest.skip(reason, allow_module_level=True)


class TestProcessor(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VisorProcessor

    @classmethod
    def setUpClass(cls) -> None:
        cls.tmpdirname, cls.full_tmpdirname = tempfile.mkdtemp(), None
        arch = testing.tiny_architecture()
        model = Visor(
            testing.random_params(arch), arch, testing.almanac_tokenizer(), all_subsets(arch.num_slots), has_policy=True
        )
        torch_export.write_folder(Path(cls.tmpdirname), model, stage="policy", dtype="float32", max_shard_bytes=10**9)
        cls._setup_test_attributes(cls.processor_class.from_pretrained(cls.tmpdirname))

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.tmpdirname, ignore_errors=True)

    def get_processor(self, use_tiny_ckpt: bool = True) -> VisorProcessor:
        return self.processor_class.from_pretrained(self.tmpdirname)
