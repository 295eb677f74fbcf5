"""What a launch may be: names, topologies, zones and numbers, and what is refused with which hint."""

from __future__ import annotations

from typing import Any

import pytest

from visor_jax.errors import RequestError
from visor_jax.launching import tpu
from visor_jax.launching.description import describe, travels, visor_argv
from visor_jax.launching.environment import environment
from visor_jax.launching.machines import GRIDS, ZONES, check_zone_of, parse_machines
from visor_jax.scale.topologies import CHIPS
from visor_jax.scale.xla_flags import FLAGS

# topology -> slices, hosts of a slice, chips per host, chips, processes
MACHINES = {
    ("v5e:1x1", 1): (1, 1, 1, 1, 1),
    ("v5e:2x2", 1): (1, 1, 4, 4, 1),
    ("v5e:2x4", 1): (1, 1, 8, 8, 1),
    ("v5e:4x4", 1): (1, 4, 4, 16, 4),
    ("v5e:4x4", 2): (2, 4, 4, 32, 8),
    ("v5e:16x16", 1): (1, 64, 4, 256, 64),
    ("v6e:2x4", 1): (1, 1, 8, 8, 1),
    ("v6e:4x8", 1): (1, 8, 4, 32, 8),
    ("v4:2x2x1", 1): (1, 1, 4, 4, 1),
    ("v5p:2x2x2", 1): (1, 2, 4, 8, 2),
    ("v5p:4x4x4", 4): (4, 16, 4, 256, 64),
    ("tpu7x:2x2x2", 1): (1, 2, 4, 8, 2),
    ("h100x1", 1): (1, 1, 1, 1, 1),
    ("h100x8", 1): (1, 1, 8, 8, 8),
    ("h100x8:2", 1): (1, 2, 8, 16, 16),
    ("h100x16", 1): (1, 2, 8, 16, 16),
    ("h200x8:4", 1): (1, 4, 8, 32, 32),
}


@pytest.mark.parametrize("given", MACHINES, ids=str)
def test_machines_of_a_topology(given: tuple[str, int]) -> None:
    found = parse_machines(*given)
    assert (found.slices, found.hosts, found.chips_per_host, found.chips, found.processes) == MACHINES[given]
    assert found.hosts * found.chips_per_host * found.slices == found.chips


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e:4x5", 1, "no such slice of v5e; the nearest are v5e:4x4 and v5e:4x8"),
        ("v5e:3x1", 1, "the nearest are v5e:2x2 and"),
        ("v5p:3x3x3", 1, "the nearest are v5p:2x4x4 and"),
        ("v6:4x4", 1, "unknown chip 'v6'"),
        ("v5e:4x4x4", 1, "expected 2 axes"),
        ("v5e", 1, "expected CHIP:AxB"),
        ("v5e:4x4\n", 1, "expected CHIP:AxB"),
        ("v5e:\uff14x4", 1, "expected CHIP:AxB"),
        ("h100x12", 1, "expected whole nodes, h100x8 or h100x8:NODES"),
        ("h100x4:2", 1, "expected whole nodes"),
        ("h100x8:0", 1, "expected 1 to 256 chips"),
        ("h100x0", 1, "expected 1 to 256 chips"),
        ("h100x8", 2, "--slices=2: h100x8 has no slices; write nodes as h100x8:2"),
        ("v5e:4x4", 0, "--slices=0: expected 1 to 256"),
    ],
)  # fmt: skip
def test_machines_that_cannot_be_rented(text: str, slices: int, message: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_machines(text, slices)
    assert message in str(error.value)


def test_tables_cover_the_chips() -> None:
    tpus = {name for name, chip in CHIPS.items() if chip.kind == "tpu"}
    assert set(GRIDS) == set(ZONES) == tpus
    for chip, grids in GRIDS.items():
        for grid in grids:
            assert parse_machines(f"{chip}:{grid}").grid == grid
        chips = {parse_machines(f"{chip}:{grid}").chips for grid in grids}
        assert len(chips) == len(grids), "an accelerator type, which counts chips, would not name one grid"


def test_a_zone_without_these_chips_names_those_with_them() -> None:
    check_zone_of("v6e", "us-east5-b")
    with pytest.raises(RequestError, match="has no v6e; did you mean 'us-east5-c' or 'us-east5-b'"):
        check_zone_of("v6e", "us-east5-d")
    with pytest.raises(RequestError, match=r"has no v4; did you mean 'us-central2-b'\?; v4 is in us-central2-b"):
        check_zone_of("v4", "us-central1-b")


GOOD: dict[str, Any] = {"target": "tpu", "name": "first", "topology": "v5e:4x4", "zone": "us-west4-a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "gce"}, "--target=\"gce\": did you mean 'gke'?; expected one of tpu, gke, slurm, sky"),
        ({"name": "My_Run 7"}, "did you mean 'my-run-7'?"),
        ({"name": "a" * 41}, f"did you mean '{'a' * 40}'?"),
        ({"zone": "us-west4"}, "did you mean 'us-west4-a'"),
        ({"zone": "us-west4-b"}, "--zone=us-west4-b: has no v5e; did you mean 'us-west4-a'"),
        ({"project": "p"}, "--project"),
        ({"image": "eu.gcr.io/p/visor:1;rm"}, "--image"),
        ({"service_account": "me@gmail.com"}, "--service-account"),
        ({"capacity": "preemptible"}, "--capacity"),
        ({"labels": ["Team=x"]}, "--label"),
        ({"buckets": ["a..b"]}, "--bucket"),
        ({"workdir": "runs/first"}, "expected gs://BUCKET/PATH or an absolute path"),
        ({"workdir": "gs://b-1/../x"}, "without '..'"),
        ({"workdir": "gs://b-1"}, "expected gs://BUCKET/PATH"),
        ({"workdir": "s3://b-1/x"}, "expected gs://BUCKET/PATH"),
        ({"max_restarts": -1}, "--max-restarts=-1: expected 0 to 10000"),
        ({"grace_seconds": 5}, "--grace-seconds=5: expected 30 to 3600"),
        ({"max_hours": 1000}, "--max-hours=1000: expected 1 to 168"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        describe(**{**GOOD, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize("secret", ["HF_TOKEN=hf_abc", "hf_aaaaaaaaaaaaaaaaaaaaaaaa", "hf-token", "", "A\n", "A;id"])
def test_a_secret_is_a_name_and_its_value_is_not_repeated(secret: str) -> None:
    with pytest.raises(RequestError) as error:
        describe(**GOOD, secrets=[secret])
    assert "--secret" in str(error.value) and "hf_a" not in str(error.value)


@pytest.mark.parametrize(
    "secret", ["PATH", "PYTHONPATH", "LD_PRELOAD", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "XLA_FLAGS"]
)
def test_a_secret_cannot_replace_a_variable_of_the_run(secret: str) -> None:
    with pytest.raises(RequestError, match=f"--secret={secret}: expected another name"):
        describe(**GOOD, secrets=[secret])


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ["--config.init_from={}"]},
        {"labels": ["team={}"]},
        {"buckets": ["{}"]},
        *({name: "{}"} for name in ("name", "topology", "zone", "project", "image", "workdir", "service_account")),
        *({name: "{}"} for name in ("capacity", "queue", "cluster", "reservation")),
    ],
    ids=str,
)
def test_a_key_in_another_argument_is_refused_and_not_repeated(changes: dict[str, Any]) -> None:
    key = "hf_aaaaaaaaaaaaaaaaaaaaaaaa"
    filled = {
        name: value.format(key) if isinstance(value, str) else [text.format(key) for text in value]
        for name, value in changes.items()
    }
    with pytest.raises(RequestError, match="looks like a secret") as error:
        describe(**{**GOOD, **filled})
    assert "hf_a" not in str(error.value)


def test_what_is_given_twice_is_there_once() -> None:
    """Kubernetes refuses two mounts at one place."""
    launch = describe(
        **GOOD, buckets=["b-1", "gs://b-1/"], secrets=["HF_TOKEN", "HF_TOKEN"], labels=["team=a", "team=b", "app=mine"]
    )
    assert (launch.buckets, launch.secrets) == (("b-1",), ("HF_TOKEN",))
    assert launch.labels == (("team", "b"), ("app", "mine"))
    assert "--labels=app=mine,team=b" in tpu.create_command(launch).argv


def test_names_that_are_accepted() -> None:
    launch = describe(
        **GOOD, project="my-project-1", image="eu-docker.pkg.dev/p/visor/visor:1.0@sha256:" + "0" * 64,
        service_account="trainer@my-project.iam.gserviceaccount.com", secrets=["HF_TOKEN"], labels=["team=vision"],
        buckets=["gs://data-1/", "data-2"], workdir="gs://runs-1/first/", queue="a.b_c",
    )  # fmt: skip
    assert launch.workdir == "gs://runs-1/first" and launch.buckets == ("data-1", "data-2")
    assert launch.labels == (("team", "vision"),)
    assert describe(**{**GOOD, "service_account": "123-compute@developer.gserviceaccount.com"})


def test_the_command_of_every_process() -> None:
    shared: dict[str, Any] = {"workdir": "gs://runs-1/first", "overrides": ["--config.train.steps=9"]}
    shipped = describe(**{**GOOD, "target": "gke"}, config="llava_ov_finetune", **shared)
    assert not travels(shipped)
    assert visor_argv(shipped, "c.json")[1:] == (
        "run", "--config=llava_ov_finetune", "--workdir=gs://runs-1/first", "--config.train.steps=9",
    )  # fmt: skip
    for launch in (describe(**GOOD, config="llava_ov_finetune", **shared), describe(**GOOD, config="a/b.py", **shared)):
        assert travels(launch)
        assert visor_argv(launch, "c.json", "v") == ("v", "run", "--config=c.json", "--workdir=gs://runs-1/first")


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4", "v6e:4x4", "tpu7x:2x2x2", "h100x8"])
def test_the_environment_of_every_process(topology: str) -> None:
    launch = describe("gke", "first", topology, workdir="gs://runs-1/a/first")
    variables = environment(launch)
    variable, flags = FLAGS[launch.machines.chip.name]
    assert variables[variable].split() == list(flags)
    assert variables["JAX_PLATFORMS"] == ("cuda,cpu" if topology.startswith("h") else "tpu,cpu")
    assert variables["VISOR_COMPILE_CACHE"] == "gs://runs-1/a/compile_cache"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("v5litepod-16", "v5e:4x4"), ("v5e-16", "v5e:4x4"), ("v5p-32", "v5p:2x2x4"), ("v6e-8", "v6e:2x4")],
)
def test_the_name_that_gcloud_gives_a_slice_is_answered_with_its_grid(given: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"--topology={given}: .*did you mean {meant}"):
        parse_machines(given)


def test_what_the_cloud_tpu_api_does_not_offer_is_said_before_its_zones() -> None:
    launch = describe("tpu", "first", "tpu7x:2x2x2", zone="us-west4-a")
    with pytest.raises(RequestError, match="use --target=gke"):
        tpu.check(launch)
