"""The paper's tables and figures as commands: what is run for each, and its numbers beside ours.

    python benchmarks/paper/run.py --list
    python benchmarks/paper/run.py --entry table2            # the commands at the paper's scale, and the table
    python benchmarks/paper/run.py --entry table2 --collect=RUNS   # keeps what these commands have measured below RUNS
    python benchmarks/paper/run.py --entry table2 --small    # the same table on the embedded data set; trains on a CPU
    python benchmarks/paper/run.py --entry table2 --small --dry-run   # what that would run
    python benchmarks/paper/run.py --entry table2 --small --steps-scale=0.02 --runs=/tmp/x \\
        --results=/tmp/x/benchmarks/results              # a trial
    python benchmarks/paper/run.py --page                    # docs/paper.md

In: the entries beside this file. Out: tables; `--collect` writes `benchmarks/results/paper/ENTRY.json`, and `--small`
what it measures (results of `benchmarks/claims.py`, and `benchmarks/results/paper/small/` of analyses). A number that
is there is not measured again. Without `--entry`, all entries.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks' folder, for `paper` and `claims`

from paper.command_line import main
from visor_jax.errors import RequestError, RunError

if __name__ == "__main__":
    try:
        sys.exit(main(description=__doc__ or ""))
    except (RequestError, RunError) as error:
        print(f"paper: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RequestError) else 1)
