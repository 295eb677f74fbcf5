"""Files that a configuration names: refused before launch where the machines cannot have them."""

from __future__ import annotations

import pytest

from visor_jax.config import load_config
from visor_jax.errors import RequestError
from visor_jax.launching.description import Launch
from visor_jax.launching.paths import check_paths, named_files

GCS = ("--config.data.root=/gcs/data-1/records", "--config.tokenizer.path=/gcs/data-1/tokenizer.json")


@pytest.mark.parametrize("target", ["tpu", "gke", "sky"])
@pytest.mark.parametrize(
    ("overrides", "buckets", "message"),
    [
        ((), (), r"--config\.tokenizer\.path=tokenizer\.json: is relative .*=/gcs/BUCKET/tokenizer\.json"),
        (GCS[1:], ("data-1",), r"--config\.data\.root=data: is relative"),
        (GCS, (), r"--config\.tokenizer\.path=/gcs/data-1/tokenizer\.json: not mounted; expected --bucket=data-1"),
        (GCS, ("data-2",), r"not mounted; expected --bucket=data-1"),
    ],
)
def test_a_file_that_the_machines_cannot_have_is_named(
    target: str, overrides: tuple[str, ...], buckets: tuple[str, ...], message: str
) -> None:
    config = load_config("llava_ov_0p5b", ["--config.data.root=data", *overrides])
    with pytest.raises(RequestError, match=message):
        check_paths(Launch(target, "first", buckets=buckets), config)


def test_a_mounted_bucket_and_a_shared_disk_are_fine() -> None:
    check_paths(Launch("tpu", "first", buckets=("data-1",)), load_config("llava_ov_0p5b", GCS))
    on_disk = ["--config.data.root=/mnt/disk/records", "--config.tokenizer.path=/mnt/disk/tokenizer.json"]
    check_paths(Launch("gke", "first"), load_config("llava_ov_0p5b", on_disk))
    check_paths(Launch("slurm", "first"), load_config("llava_ov_0p5b"))  # the job runs in the folder of its submission


def test_a_mixture_here_does_not_travel(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("datasets: []\n")
    config = load_config("llava_ov_0p5b", [*GCS, "--config.data.mixture=mine.yaml", "--config.data.path="])
    assert ("data.mixture", "mine.yaml") in named_files(config)
    with pytest.raises(RequestError, match=r"--config\.data\.mixture=mine\.yaml: is relative"):
        check_paths(Launch("sky", "first", buckets=("data-1",)), config)


def test_generated_data_need_no_files() -> None:
    assert named_files(load_config("almanac_mini")) == []
