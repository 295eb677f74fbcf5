"""The commands of `visor`: one short module each, found by name through the table in `command_line.py`.

A command module only wires rooms together. It exposes

- `HELP: str`: one line for `visor --help`; the module's docstring is the text of `visor COMMAND --help`.
- `CONFIG: str`: where its configuration comes from: "required" (`--config` must be given), "workdir" (`--config`, else
  the `config.json` in `--workdir`), "optional" (as "workdir", but None where there is neither), or "none".
- `add_arguments(parser: argparse.ArgumentParser) -> None`: its own arguments. `--config`, `--workdir`, `--json` and
  `--config.field=value` are there for every command: they are not added again.
- `main(args: argparse.Namespace, config: ConfigDict | None) -> int | dict | Iterator[dict] | None`: the work.
  `args.workdir` is a str or None, `args.json` a bool; `config` is checked. A dict is the result, exit status 0: with
  `--json` it is the last line of stdout, without it the command has said on stdout what people want to know. An
  iterator's dicts are a line each, printed as they come. An int is the exit status; None is 0.

- `WORKDIR: str`: "required" where it cannot do without `--workdir`; left out otherwise.

- `WATCHED: bool`: True where the work is done inside `watched` (below), as that of a command that takes long; left out
  otherwise. Until then there is nothing to clean up, and SIGINT ends the process at once with 130.

A command that takes long does its work inside `watched(config.train.hang_seconds)` of `visor_jax.workdir.supervision`,
and its loops call `beat`: then a hang ends with 134, and SIGINT cannot be swallowed on the way.

With `--json` all that is printed goes to stderr but that line. Mistakes are raised, not printed: `RequestError` exits
2, `RunError` 1, `SystemExit` (143 after SIGTERM) passes. Modules import nothing heavy at their top (JAX, the model):
`visor --help` loads them all; `main` imports what it needs.
"""
