"""`visor COMMAND`, also `python -m visor_jax COMMAND`: the entry point, which answers signals from its first line on.

In: the command line. Out: the exit status. It imports next to nothing before signals are owned, so that SIGINT while
the rest is imported is exit status 130 and no traceback. The command line itself is `commands/command_line.py`.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; what is a defect of ours is raised and keeps its traceback."""
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
