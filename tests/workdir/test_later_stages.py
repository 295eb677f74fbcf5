"""A run may be planned stage by stage: overrides of stages that have not begun may change in a workdir."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.config import as_config, from_dict, stage_config
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir


def test_overrides_of_a_stage_may_change_until_it_begins(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.claim(tiny_config({"stage_overrides.base_lists.steps": 5}))
    longer = as_config(tiny_config({"stage_overrides.base_lists.steps": 7}))
    workdir.claim(longer)
    assert stage_config(from_dict(workdir.config()), "base_lists").steps == 7
    workdir.stage("base_lists").path.mkdir()
    workdir.claim(longer)
    with pytest.raises(RequestError, match=r"base_lists\.steps is 7 there and 9 here; expected .*STAGE \(init_from\)"):
        workdir.claim(tiny_config({"stage_overrides.base_lists.steps": 9}))
    with pytest.raises(RequestError, match=r"data\.text_length is 64 there and 80 here; expected .* another folder$"):
        workdir.claim(tiny_config({"stage_overrides.base_lists.steps": 7, "data.text_length": 80}))
