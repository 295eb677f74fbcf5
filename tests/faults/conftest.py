"""Faults of whole runs, end to end. "Failure, by contract" of the design, line by line, and the tests of each line.

| contract | tests |
| --- | --- |
| data: broken, missing and hostile files are skipped and counted; limits | `tests/data/test_bad_inputs.py`, `tests/data/sources/test_hostile_files.py`, `tests/data/test_picture_paths.py`, `tests/data/test_images.py` |
| data: a worker that dies is reported | `test_resources.py`, `tests/data/test_check.py` |
| position: one counter; resumed runs see the same samples | `test_kill.py` (`sample_ids_sha256`), `tests/data/test_pipeline.py` |
| several processes: one is killed, stopped or hangs | `test_processes.py`, `tests/checkpoint/test_processes.py` |
| SIGTERM: 143, saved, equal afterwards | `test_sigterm.py`, `tests/commands/test_signals.py`, `tests/train/test_loop.py` |
| kill -9 at any moment | `test_kill.py`, `tests/checkpoint/test_processes.py`, `tests/evaluate/test_chunks.py` |
| checkpoints prove themselves; the next older step is used and the damage named | `test_damage.py`, `tests/checkpoint/test_restoring.py` |
| another configuration's or data set's state is refused by name | `test_damage.py`, `test_bad_inputs.py` (64, 68), `tests/commands/test_recipe.py` |
| a failed save is reported, retried, and ends in exit 1 | `test_resources.py`, `tests/commands/test_surroundings.py`, `tests/checkpoint/test_manager.py` |
| another mesh or device count | `tests/checkpoint/test_processes.py` |
| an older version's workdir | `test_bad_inputs.py` (65), `tests/commands/test_recipe.py`, `tests/workdir/test_folder.py` |
| NaN or Inf: nothing changes, samples are named, too many end the run | `test_resources.py`, `tests/train/test_loop.py`, `tests/train/test_faults.py` |
| hang: 134; SIGUSR1 dumps stacks | `tests/commands/test_signals.py`, `tests/workdir/test_supervision.py` |
| a workdir holds data only | `test_bad_inputs.py` (8), `tests/workdir/test_results.py`, `tests/scale/test_compiler_options.py` |
| from outside: safetensors only, everything checked, nothing run | `test_bad_inputs.py` (50-60), `test_fuzzing.py`, `tests/hf/test_hostile_folders.py` |
| dataset text is escaped in the report | `test_bad_inputs.py` (78), `tests/report/test_page.py` |
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.whole_run import CONFIG, visor


@pytest.fixture(scope="session")
def uninterrupted(compiled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run that nothing interrupted and, beside it, its configuration file."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "tiny.py").write_text(CONFIG)
    status, err = visor("run", f"--config={folder}/tiny.py", f"--workdir={folder}/run", compiled=compiled)
    assert status == 0, err
    return folder
