"""Stands in for `sky`: managed jobs in `jobs.json`, each with the state that a test sets. Standard library only."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from program import read, write


def main(arguments: list[str]) -> int:
    jobs: Any = read("jobs.json", [])
    verb, name = arguments[1], arguments[arguments.index("--name") + 1] if "--name" in arguments else ""
    if verb == "launch":
        wanted = re.findall(r"^  ([A-Z][A-Z0-9_]*): null$", Path(arguments[-1]).read_text(), re.MULTILINE)
        given = [value for flag, value in itertools.pairwise(arguments) if flag == "--secret"]
        if missing := [secret for secret in given if secret not in os.environ]:
            sys.stderr.write(f"Error: {missing[0]} is not set in local environment.\n")
            return 2
        assert wanted == given
        jobs.append({"job_id": len(jobs) + 1, "job_name": name, "status": "PENDING", "recovery_count": 0})
        write("jobs.json", jobs)
    elif verb == "queue":
        print("Fetching managed job statuses...")
        print(json.dumps(jobs, indent=2))
    elif verb == "cancel":
        for job in jobs:
            if job["job_name"] == name and job["status"] in ("PENDING", "RUNNING", "RECOVERING"):
                job["status"] = "CANCELLED"
        write("jobs.json", jobs)
    elif verb == "logs":
        print(f"({name}, rank=0) step 1")
    return 0
