"""The entry point of `visor COMMAND` and `python -m visor_jax COMMAND`.

It installs signal handlers before it imports the rest, so that SIGINT during imports gives exit status 130 without a
traceback. `commands/command_line.py` implements the command line.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; defects of this package raise and keep their traceback."""
    try:
        from visor_jax.workdir.fault_points import fault_point
        from visor_jax.workdir.supervision import supervised

        with supervised(starting=argv is None) as stop:
            fault_point("start")
            from visor_jax.commands import command_line

            if argv is None:
                command_line.own_standard_streams()
            return command_line.run(sys.argv[1:] if argv is None else argv, stop)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
