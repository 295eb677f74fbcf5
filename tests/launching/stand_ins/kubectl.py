"""Stands in for `kubectl`: a cluster with JobSets, their pods, and secrets whose values nobody may ask for.

`jobsets.json` holds what was applied, with the status that a test sets. Standard library only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from program import read, write


def failure(text: str) -> int:
    sys.stderr.write(f"Error from server {text}\n")
    return 1


def main(arguments: list[str]) -> int:
    words = [word for word in arguments if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    sets: Any = read("jobsets.json", {})
    if words[0] == "apply":
        return apply(Path(flags["filename"]).read_text(), sets)
    if words[0] == "logs":
        print(f"[pod/{flags['selector'].partition('=')[2]}-slice-0-0-abcde/{flags['container']}] step 1")
        return 0
    kind, name = words[1], words[2] if len(words) > 2 else ""
    if words[0] == "delete":
        sets.pop(name, None) if kind == "jobset" else None
        write("jobsets.json", sets)
        return 0
    if kind == "secret":
        known = name in read("secrets.json", {})  # type: ignore[operator]
        print(f"secret/{name}") if known and flags["output"] == "name" else None
        return 0 if known else failure(f'(NotFound): secrets "{name}" not found')
    if kind == "pods":
        owner = flags["selector"].partition("=")[2]
        print(json.dumps({"items": [{"status": {"phase": phase}} for phase in sets[owner].get("pods", [])]}))
        return 0
    if name in sets:
        print(json.dumps(sets[name]["document"]))
    return 0


def apply(text: str, sets: Any) -> int:
    """Creates the JobSet of a manifest; one that exists may not change."""
    (name,) = re.findall(r"^kind: JobSet\nmetadata:\n  name: (\S+)$", text, re.MULTILINE)
    if name in sets and sets[name]["manifest"] != text:
        return failure(f'(Invalid): jobsets.jobset.x-k8s.io "{name}" is invalid: field is immutable')
    (digest,) = re.findall(r"^ +visor-jax/launch: '?(\w+)'?$", text, re.MULTILINE)
    document = {"metadata": {"name": name, "annotations": {"visor-jax/launch": digest}}, "spec": {}, "status": {}}
    sets.setdefault(name, {"manifest": text, "document": document, "pods": ["Pending"]})
    write("jobsets.json", sets)
    print(f"jobset.jobset.x-k8s.io/{name} created")
    return 0
