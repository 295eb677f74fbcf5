"""Stands in for `gcloud`: queued resources with their states, and workers whose commands are run by bash in a folder.

A request passes through the states of `schedule.json`, one per description. Each worker of an active request has a home
folder below `workers/`; `ssh` runs the command there, with stand-ins for sudo, systemd and uv on PATH.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from program import FOLDER, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def failure(verb: str, text: str) -> int:
    sys.stderr.write(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) {text}\n")
    return 1


def main(arguments: list[str]) -> int:
    words = [argument for argument in arguments if not argument.startswith("-")]
    flags = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
    if words[0] == "storage":
        return storage(words[1:])
    if words[0] == "secrets":
        sys.stdout.write(read("secrets.json", {})[flags["secret"]])
        return 0
    verb, name = words[words.index("tpus") + 2], words[-1 if "scp" in words else words.index("tpus") + 3]
    name = name.partition(":")[0]
    requests: Any = read("requests.json", {})
    if "tpu-vm" in words:
        return slice_state(requests, name)
    if verb == "create":
        if name in requests:
            return failure(verb, "ALREADY_EXISTS: resource already exists")
        count = int(flags.get("node-count", 1))
        nodes = [name] if count == 1 else [f"{name}-{index}" for index in range(count)]
        requests[name] = {
            "type": flags["accelerator-type"],
            "nodes": nodes,
            "states": read("schedule.json", ["ACTIVE"]),
        }
        write("requests.json", requests)
        return 0
    if name not in requests:
        return failure(verb, f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found")
    request = requests[name]
    if verb == "describe":
        return describe(requests, request)
    if verb == "delete":
        remove(request)
        del requests[name]
        write("requests.json", requests)
        return 0
    if request["states"][0] != "ACTIVE":
        return failure(verb, f"Queued resource {name} is not ACTIVE")
    nodes = request["nodes"] if flags.get("node") == "all" else request["nodes"][:1]
    return on_workers(verb, nodes, flags, words)


def describe(requests: Any, request: Any) -> int:
    state, *later = request["states"]
    if state is None:  # deleted in the meantime
        write("requests.json", {})
        return failure("describe", "NOT_FOUND: Resource was not found")
    detail = {"failedData": {"error": {"code": 8, "message": "no capacity"}}} if state == "FAILED" else {}
    spec = [{"nodeId": node, "node": {"acceleratorType": request["type"]}} for node in request["nodes"]]
    print(json.dumps({"state": {"state": state, **detail}, "tpu": {"nodeSpec": spec}, **request.get("paid", {})}))
    request["states"] = later or [state]
    write("requests.json", requests)
    return 0


def slice_state(requests: Any, node: str) -> int:
    for request in requests.values():
        if node in request["nodes"]:
            print(request.get("slices", {}).get(node, "READY"))
            return 0
    sys.stderr.write(f"ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: {node}\n")
    return 1


def workers(nodes: list[str]) -> list[str]:
    """Returns the home folders of the workers of these slices."""
    count = read("workers.json", 1)
    homes = [os.path.join(FOLDER, "workers", f"{node}-w-{index}") for node in nodes for index in range(count)]
    for home in homes:
        os.makedirs(home, exist_ok=True)
    return homes


def on_workers(verb: str, nodes: list[str], flags: dict[str, str], words: list[str]) -> int:
    homes = workers(nodes) if flags.get("worker") == "all" else workers(nodes)[:1]
    for home in homes:
        host = os.path.basename(home)
        if verb == "scp":
            target = os.path.join(home, words[-1].partition(":")[2])
            if not os.path.isdir(target):
                return failure(verb, f"scp: dest open {target}: No such file or directory")
            for file in words[words.index("scp") + 1 : -1]:
                copy(file, os.path.join(target, os.path.basename(file)))
            continue
        environment = {**os.environ, "HOME": home, "UNITS": os.path.join(home, "units"), "HOSTNAME": host}
        os.chdir(home)
        sys.stdout.flush()
        pid = os.posix_spawn("/bin/bash", ["bash", "-c", flags["command"]], environment)
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            return failure(verb, f"command failed on {host} with {status}")
    return 0


def copy(source: str, target: str) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(old.read())


def end(unit: Any) -> None:
    """Ends the supervisor of a unit, and then its process."""
    for pid in (unit.get("supervisor"), unit.get("pid")):
        if pid is not None:
            try:  # noqa: SIM105
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def remove(request: Any) -> None:
    """Ends the processes on the workers of a request and removes their disks."""
    import glob
    import shutil

    for node in request["nodes"]:
        for home in glob.glob(os.path.join(FOLDER, "workers", f"{node}-w-*")):
            for unit in glob.glob(os.path.join(home, "units", "*.json")):
                end(read(unit, {}))
            shutil.rmtree(home, ignore_errors=True)


def storage(words: list[str]) -> int:
    """Copies a file into the folder `bucket`, or prints files of it."""
    if words[0] == "cp":
        target = os.path.join(FOLDER, "bucket", words[2].removeprefix("gs://"))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        copy(words[1], target)
        return 0
    import glob

    for file in sorted(glob.glob(os.path.join(FOLDER, "bucket", words[1].removeprefix("gs://")))):
        with open(file) as text:
            sys.stdout.write(text.read())
    return 0
