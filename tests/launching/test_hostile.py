"""Hostile names in every field of every target: refused, or one argument that nothing interprets.

Clients are recording stand-ins. Each target is asked to start a run through the command line; a value that is refused
reaches no client. Values of `--config.field=value` are free text: they have to arrive unchanged.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching.conftest import Clients
from tests.launching.golden_files import GKE, SKY, SLURM, TPU
from visor_jax.__main__ import main
from visor_jax.launching import gke, sky, slurm
from visor_jax.launching.description import describe

TARGETS = {"tpu": TPU, "gke": GKE, "slurm": SLURM, "sky": SKY}
HOSTILE = {
    "semicolon": "a; touch ran",
    "substitution": "a$(touch ran)",
    "backquotes": "a`touch ran`",
    "variable": "a${HOME}",
    "single quote": "a'; touch ran; '",
    "double quote": 'a"; touch ran; "',
    "new line": "a\ntouch ran",
    "end of line": "a\n",
    "pipe": "a|touch ran",
    "ampersand": "a&touch ran",
    "redirection": "a>ran",
    "glob": "a*",
    "space": "a b",
    "tab": "a\tb",
    "here-document": "a\nVISOR_END\ntouch ran\n",
    "template": "a{{ 7 * 7 }}",
    "yaml": "a: {b: c}",
    "comma": "a,b=c",
    "long": "a" * 300,
    "unicode": "a\u00e9",
    "look-alike": "\u0430bc",
    "right to left": "a\u202eb",
    "zero width": "a\u200bb",
    "leading dash": "-a",
    "option": "--impersonate-service-account=evil@p.iam.gserviceaccount.com",
    "path": "../../etc/passwd",
    "encoded path": "a%2e%2e%2fb",
    "backslash": "a\\b",
    "escape": "a\x1b[31m",
    "delete": "a\x7f",
}
FLAGS = {
    "name": "--name",
    "topology": "--topology",
    "zone": "--zone",
    "project": "--project",
    "image": "--image",
    "service_account": "--service-account",
    "secrets": "--secret",
    "labels": "--label",
    "buckets": "--bucket",
    "workdir": "--workdir",
    "cluster": "--cluster",
    "queue": "--queue",
    "capacity": "--capacity",
    "reservation": "--reservation",
}
PREFIX = {"workdir": "gs://runs-1/", "labels": "team=", "image": "eu.gcr.io/p/", "topology": "v5e:"}
# What only looks hostile: names that are harmless in these fields.
HARMLESS = {("workdir", "comma"), ("workdir", "option"), ("workdir", "leading dash"), ("labels", "leading dash")}


def arguments(target: str, **changes: Any) -> list[str]:
    """Returns the command line of a case of the golden files, with changes."""
    fields = {**TARGETS[target], **changes}
    fields.pop("config_json"), fields.pop("config")
    line = ["launch", f"--target={target}", "--config=almanac_mini", "--force"]
    for field, value in fields.items():
        if field in FLAGS:
            values = [value] if isinstance(value, str) else value
            line += [f"{FLAGS[field]}={item}" for item in values]
    return line


@pytest.mark.parametrize("target", TARGETS)
def test_the_unchanged_command_line_reaches_the_client(
    clients: Clients, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests below would show nothing."""
    monkeypatch.setenv("HF_TOKEN", "x")  # from which sky takes it
    answer(clients)
    clients.set(secrets={"HF_TOKEN": "x", "hf-token": "x"})
    assert main([*arguments(target), "--dry-run"]) == 0 and not clients.calls()
    if target != "tpu":  # test_tpu.py starts it
        assert main(arguments(target)) == 0 and clients.calls()


def answer(clients: Clients) -> None:
    """Lets the stand-ins answer as if nothing of this name existed."""
    clients.set(answers={"sbatch": {"out": "7\n"}}, schedule=["ACTIVE"])


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_a_zone_and_a_project(clients: Clients, target: str) -> None:
    zone = TARGETS[target].get("zone") or "us-central1-a"
    assert main([*arguments(target), f"--zone={zone}", "--project=my-project", "--dry-run"]) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_secret_of_the_environment_stays_there(
    clients: Clients, target: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its name is given, and its value is in the environment, as for SkyPilot and Slurm: it is written nowhere."""
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-canary")
    answer(clients)
    clients.set(secrets={"HF_TOKEN": "s3cr3t-canary", "hf-token": "s3cr3t-canary"})
    line = arguments(target, secrets=("HF_TOKEN",))
    assert main(line) == 0 and main([*line, "--dry-run", "--json"]) == 0
    for action in ("status", "stop", "delete"):
        main(["launch", action, *line[1:]])
    argv = (clients.folder / "log.jsonl").read_text()
    written = [path for folder in (Path.cwd(), clients.folder / "workers") for path in folder.rglob("*")]
    text = "".join([argv, *capfd.readouterr(), *(path.read_text() for path in written if path.is_file())])
    assert "HF_TOKEN" in text and "s3cr3t-canary" not in text


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_hostile_name_is_refused_before_any_client_is_called(
    clients: Clients, target: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, text in HOSTILE.items():
        if (field, kind) in HARMLESS:
            continue
        value = PREFIX.get(field, "") + text
        line = arguments(target, **{field: (value,) if field in ("secrets", "labels", "buckets") else value})
        if kind != "semicolon":  # `up` has been shown once: reading the configuration takes longer than all the rest
            line = ["launch", "status", *(argument for argument in line[1:] if not argument.startswith("--config"))]
        status = main(line)
        error = capsys.readouterr().err
        assert status == 2 and "Traceback" not in error, (kind, error)
        *_, last = error.splitlines()
        assert last.startswith("visor: ") and FLAGS[field] in last and last.isprintable() and len(last) < 800, last
        assert not clients.calls() and not list(Path.cwd().iterdir()), kind


@pytest.mark.parametrize("target", TARGETS)
def test_empty_names_are_refused(clients: Clients, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for field in ("name", "workdir"):
        assert main(arguments(target, **{field: ""})) == 2
        assert FLAGS[field] in capsys.readouterr().err
    for field in ("secrets", "labels", "buckets"):
        assert main(arguments(target, **{field: ("",)})) == 2
        assert FLAGS[field] in capsys.readouterr().err
    assert not clients.calls()


@pytest.mark.parametrize("kind", HOSTILE)
def test_free_text_arrives_unchanged(kind: str, tmp_path: Path) -> None:
    """In the resolved configuration, and where a shipped one keeps its overrides on the command line."""
    override = f"--config.data.root={HOSTILE[kind]}"
    own = {"config": "my.py", "config_json": json.dumps({"root": HOSTILE[kind]}), "overrides": (override,)}
    shipped = {"config": "llava_ov_0p5b", "overrides": (override,)}
    documents = list(yaml.safe_load_all(gke.manifest(describe(**{**GKE, **shipped}))))
    (container,) = documents[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert shlex.split(container["args"][0].replace("$$", "$"))[-1] == override  # Kubernetes makes $ of $$
    task = yaml.safe_load(sky.task(describe(**{**SKY, **shipped})))
    (line,) = [text for text in task["run"].split("\n  ")[0:] if "exec visor" in text] or [task["run"]]
    assert override in shlex.split(line[line.index("exec visor") :])
    script = slurm.script(describe(**{**SLURM, **shipped}))
    assert override in shlex.split(script, comments=True)
    configs = list(yaml.safe_load_all(gke.manifest(describe(**{**GKE, **own}))))
    (config,) = [document for document in configs if document["kind"] == "ConfigMap"]
    assert json.loads(next(iter(config["data"].values()))) == {"root": HOSTILE[kind]}


def test_a_dry_run_with_hostile_free_text_is_still_a_script(
    clients: Clients, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Run by bash, with clients that only record, it creates no file that a value asked for."""
    text = "a'; touch ran; '\nVISOR_END\ntouch ran\n$(touch ran)`touch ran`\"; touch ran; \""
    for target in TARGETS:
        assert main([*arguments(target), f"--config.data.root={text}", "--dry-run"]) == 0
        script = capsys.readouterr().out
        assert "touch ran" in script
        subprocess.run(["bash", "-c", script.replace(sys.executable, "true")], capture_output=True, check=False)
        assert clients.calls() and not list(tmp_path.rglob("ran")), target
        clients.forget()
