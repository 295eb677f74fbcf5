"""The commands of `visor`: one short module each, listed in the table of `command_line.py`.

A command module only connects other packages. It defines

- `HELP: str`: one line for `visor --help`; the module's docstring is the text of `visor COMMAND --help`.
- `CONFIG: str`: the source of its configuration: "required" (`--config` must be given), "workdir" (`--config`, else
  the `config.json` in `--workdir`), "optional" (as "workdir", or None if there is neither), "given" (`--config`, or
  None; a workdir is not read, and `args.overrides` holds the overrides as they were typed), or "none".
- `add_arguments(parser: argparse.ArgumentParser) -> None`: adds its arguments. Every command already has `--config`,
  `--workdir`, `--json` and `--config.field=value`.
- `main(args: argparse.Namespace, config: ConfigDict | None) -> int | dict | Iterator[dict] | None`: the work.
  `args.workdir` is a str or None, `args.json` a bool; `config` is validated. A dict is the result, exit status 0:
  `--json` prints it as the last line of stdout; otherwise the command itself prints a summary. An iterator's dicts are
  printed as one line each, as they arrive. An int is the exit status; None is 0.
- `WORKDIR: str`: "required" if `--workdir` must be given; omitted otherwise.
- `WATCHED: bool`: True if the command does its work inside `watched` (below), as long commands do; omitted otherwise.
  Before `watched` there is nothing to clean up, and SIGINT ends the process immediately with 130.

- `PROCESSES: str`: "all" if all processes of a run share the work; omitted if process 0 does it alone.

A long command does its work inside `watched(config.train.hang_seconds)` of `visor_jax.workdir.supervision`, and its
loops call `beat`: a hang then ends with 134, and a library cannot suppress SIGINT.

With `--json` everything except that line is printed to stderr. Errors are raised, not printed: `RequestError` exits
with 2, `RunError` with 1, `SystemExit` (143 after SIGTERM) passes. Modules do not import JAX or the model at the top,
because `visor --help` imports them all; `main` imports what it needs.
"""
