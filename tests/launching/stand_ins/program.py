"""The program behind every stand-in for a client: `python program.py NAME ARGUMENT...`.

It appends its name and arguments to `log.jsonl` in the folder that STAND_INS names. A fault in `faults.json` whose
pattern matches the command line makes it fail as often as that says. `answers.json` maps patterns to output for clients
without a module of their own; `gcloud.py`, `kubectl.py`, `sky.py` and `systemd.py` keep state. Standard library only,
and few modules of it, because every call of every client starts it.
"""

from __future__ import annotations

import json
import os
import sys

FOLDER = os.environ["STAND_INS"]


def read(name: str, default: object) -> object:
    """Returns the JSON of a file of this test's folder, or any other file by its absolute path."""
    try:
        with open(os.path.join(FOLDER, name)) as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def write(name: str, value: object) -> None:
    path = os.path.join(FOLDER, name)
    with open(f"{path}.{os.getpid()}", "w") as file:
        json.dump(value, file)
    os.replace(file.name, path)


def fail_if_told(line: str) -> None:
    """Exits as the first matching fault says, and counts it."""
    faults = read("faults.json", [])
    if faults:
        import re
    for fault in faults:
        if fault["times"] and re.search(fault["match"], line):
            fault["times"] -= 1
            write("faults.json", faults)
            sys.stderr.write(fault["err"] + "\n")
            sys.exit(fault["status"])


def main(name: str, arguments: list[str]) -> int:
    with open(os.path.join(FOLDER, "log.jsonl"), "a") as log:
        log.write(json.dumps([name, *arguments]) + "\n")
    line = " ".join([name, *arguments])
    fail_if_told(line)
    if name == "gcloud":
        import gcloud

        return gcloud.main(arguments)
    if name in ("systemctl", "systemd-run"):
        import systemd

        return systemd.main(name, arguments)
    if name in ("kubectl", "sky"):
        import importlib

        return importlib.import_module(name).main(arguments)
    import re

    for pattern, answer in read("answers.json", {}).items():
        if re.search(pattern, line):
            sys.stdout.write(answer.get("out", ""))
            sys.stderr.write(answer.get("err", ""))
            return answer.get("status", 0)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    sys.modules["program"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1], sys.argv[2:]))
