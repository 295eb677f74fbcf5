"""A stage that trains in a bucket: its losses are those of a local run, also after it was stopped."""

from __future__ import annotations

import pytest

from visor_jax.commands import recipe
from visor_jax.testing import tiny_config
from visor_jax.train import loop
from visor_jax.workdir.metrics_log import read_rows


@pytest.mark.usefixtures("quick", "unchecked_shapes")  # a path of etils is no subclass of `Path`
def test_a_stopped_stage_goes_on_and_equals_a_local_one(tiny_run, bucket, monkeypatch):
    config = tiny_config()

    def stop_at_4(name: str, step: int = 0) -> None:
        if (name, step) == ("step", 4):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fault_point", stop_at_4)
        with pytest.raises(KeyboardInterrupt):
            recipe.run_stages(config, str(bucket), ("base",))
    assert [path.name for path in (bucket / "base" / "checkpoints").iterdir()] == ["2"]
    assert not (bucket / "lock.json").exists()
    recipe.run_stages(config, str(bucket), ("base",))
    mine, local = (
        [(row["step"], row["loss"]) for row in read_rows(run / "base" / "metrics.jsonl")] for run in (bucket, tiny_run)
    )
    assert mine == local and len(mine) == 4
    assert (bucket / "base" / "complete.json").exists()
