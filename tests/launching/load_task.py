"""Loads a SkyPilot task and lets SkyPilot choose machines for it, without a network or credentials.

`PYTHON load_task.py FILE HOME COMMANDS`, by a Python that has skypilot. COMMANDS is a JSON list of command lines, which
the parser of `sky` reads. The catalog in HOME is made up, with the columns and the spelling of SkyPilot's own. Prints
what SkyPilot understood as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

FILE, HOME = Path(sys.argv[1]), Path(sys.argv[2])
TPUS = ("v4-16", "v5litepod-16", "v5p-32", "v6e-16", "v6e-256")
ZONES = (("us-east5", "us-east5-b"), ("us-west4", "us-west4-a"), ("us-central1", "us-central1-a"))
COLUMNS = (
    "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"
)


def write_catalog() -> None:
    """Writes the catalog where SkyPilot looks for it before it asks the network."""
    from sky.skylet import constants

    rows = [COLUMNS]
    for region, zone in ZONES:
        place = f"{region},{zone}"
        rows.append(f"n1-highmem-8,8.0,52.0,,,,{place},0.47,0.1")
        rows += [f",,,tpu-{name},1,tpu-{name},{place},{9 + i}.0,{3 + i}.0" for i, name in enumerate(TPUS)]
        for name, machine in (("H100", "a3-highgpu-8g"), ("H200", "a3-ultragpu-8g")):
            rows += [f"{machine},208.0,1872.0,,,,{place},9.5,2.9", f",,,{name},8,{name},{place},80.0,30.0"]
    folder = HOME / ".sky/catalogs" / constants.CATALOG_SCHEMA_VERSION / "gcp"
    folder.mkdir(parents=True)
    (folder / "vms.csv").write_text("\n".join(rows) + "\n")
    (folder / "images.csv").write_text("Tag,Region,OS,OSVersion,ImageId,CreationDate\n")
    names = [*(f"tpu-{name}" for name in TPUS), "H100", "H200"]
    common = folder.with_name("common") / "accelerators.csv"
    common.parent.mkdir()
    common.write_text("AcceleratorName,Clouds\n" + "".join(f"{name},GCP\n" for name in names))
    (folder / "accelerator_quota_mapping.csv").write_text("Accelerator,Quota\n")


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError("no network in this test")


def parse(words: list[str]) -> None:
    """Raises an error if `sky` does not know a command or an option."""
    from sky.client.cli import command

    place, name = command.cli, words.pop(0)
    while hasattr(place, "commands") and words:
        name = words.pop(0)
        place = place.commands[name]
    place.make_context(name, words)


def main() -> None:
    os.environ |= {"HOME": str(HOME), "SKY_RUNTIME_DIR": str(HOME), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    write_catalog()
    import sky
    import yaml
    from sky import check, clouds, optimizer

    socket.getaddrinfo = refuse
    socket.socket.connect = refuse  # type: ignore[method-assign]
    check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: [clouds.GCP()]
    content = yaml.safe_load(FILE.read_text())
    secrets = [(name, "not the value") for name in content.get("secrets", {})]
    task = sky.Task.from_yaml_config(content, secrets_overrides=secrets)
    with sky.Dag() as dag:
        dag.add(task)
    (chosen,) = optimizer.Optimizer.optimize(dag, quiet=True).tasks
    best = chosen.best_resources
    for words in json.loads(sys.argv[3]):
        parse(words)
    result = {
        "name": task.name,
        "nodes": task.num_nodes,
        "machine": best.instance_type,
        "accelerators": best.accelerators,
        "arguments": best.accelerator_args,
        "spot": best.use_spot,
        "zone": best.zone or "",
        "recovery": best.job_recovery,
        "secrets": sorted(task.secrets),
        "envs": task.envs,
        "hooks": best.hooks,
        "run": task.run,
        "hourly": best.get_cost(3600),
    }
    print("\n" + json.dumps(result, default=str))


if __name__ == "__main__":
    main()
