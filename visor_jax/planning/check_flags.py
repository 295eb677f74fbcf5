"""Checks that the installed libtpu and jaxlib know every flag of `visor_jax.scale.xla_flags`.

    python -m visor_jax.planning.check_flags [CHIP ...]

Compiles a matrix product for each chip with its flags, in a process of its own, because both libraries end the process
at the first unknown flag. Prints one line per chip; exit status 1 if a flag is unknown, 2 without libtpu.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from visor_jax.planning.compiling import WITHOUT_TPU
from visor_jax.scale.topologies import CHIPS
from visor_jax.scale.xla_flags import FLAGS, GPU, set_flags

_PROGRAM = """
import sys, jax, numpy, jax.numpy as jnp
from visor_jax.planning.worker import topology_devices
device = topology_devices(sys.argv[1])[0] if len(sys.argv) > 1 else jax.devices()[0]
mesh = jax.sharding.Mesh(numpy.array([device]), ("device",))
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


def problem(chip: str, environment: Mapping[str, str] = os.environ) -> str:
    """Returns the message about the first flag of `chip` that is unknown; "" if all are known."""
    given = {name: value for name, value in environment.items() if name not in (FLAGS[chip][0], "VISOR_XLA_FLAGS")}
    given |= WITHOUT_TPU if FLAGS[chip][0] != GPU else {"JAX_PLATFORMS": "cpu"}
    set_flags(given, chip)
    axes = CHIPS[chip].axes
    topology = [f"{chip}:{'x'.join(['2', '2', '1'][:axes])}"] if axes else []
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM, *topology], env=given, capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.splitlines() if "nknown" in line] or done.stderr.splitlines()[-1:]
    return lines[0] if lines else f"exit status {done.returncode}"


def main(chips: Sequence[str]) -> int:
    """Prints a line per chip; returns the exit status."""
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed; install the extra [aot]", file=sys.stderr)
        return 2
    problems = {chip: problem(chip) for chip in chips or FLAGS}
    for chip, message in problems.items():
        print(f"{chip}: {message or f'all {len(FLAGS[chip][1])} flags are known'}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
