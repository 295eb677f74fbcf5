"""Starts a run on machines that are not this one, from one description.

`description.py` holds what a launch is, `names.py` checks every name before it reaches a command line, and
`machines.py` knows what can be rented. `tpu.py`, `gke.py`, `slurm.py` and `sky.py` share one interface:

- `check(launch) -> None` raises a RequestError for what this target cannot do.
- `ACTIONS: Mapping[str, Callable[[Launch, Runner], dict]]` has `up`, `logs`, `status`, `stop`, `resume` and `delete`.
  The dict is what `visor launch --json` prints.

Commands are argument lists that `steps.Runner` runs or, for a dry run, prints. No JAX import; nothing here needs a
client, credentials or the network before a command is run.
"""
