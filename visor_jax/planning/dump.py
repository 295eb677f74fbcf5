"""What XLA:TPU writes about a program once it is optimized, scheduled and laid out in memory: before machine code.

In: the folder of `--xla_dump_to`. Out: the program's text and the bytes of its temporaries. Machine code takes 5 to 20
times as long to generate, and changes neither. No JAX import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FUNCTION = "update_step"  # the jitted step; small programs around it are dumped too
FLAGS = "--xla_dump_to={folder} --xla_dump_hlo_as_text=true --xla_dump_hlo_module_re=.*" + FUNCTION + ".*"
_TEXT, _BUFFERS = "after_optimizations_after_buffer_assignment.txt", "after_optimizations-buffer-assignment.txt"
_TEMPORARIES = re.compile(r"^allocation \d+: size (\d+)(?:, color 0)?, preallocated-temp:", re.MULTILINE)


@dataclass(frozen=True)
class Dumped:
    """A program before machine code.

    Attributes:
      text: HLO after all optimizations, scheduled.
      temporaries: bytes of its buffers in the chip's memory, without arguments.
    """

    text: str
    temporaries: int


class Folder:
    """The folder into which a process dumps one program."""

    def __init__(self, path: Path):
        self._path = path
        self._sizes: list[int] = []

    def finished(self) -> bool:
        """Returns whether both files are there and have not grown since the last call."""
        sizes = [file.stat().st_size for file in self._files()]
        before, self._sizes = self._sizes, sizes
        return len(sizes) == 2 and 0 not in sizes and sizes == before

    def read(self) -> Dumped:
        """Reads the dumped program.

        Raises:
          ValueError: the file of buffers names no temporaries; this version of libtpu writes it in another way.
        """
        text, buffers = (file.read_text() for file in self._files())
        return Dumped(text, temporaries(buffers))

    def _files(self) -> list[Path]:
        return [file for name in (_TEXT, _BUFFERS) for file in sorted(self._path.glob(f"*{FUNCTION}*.{name}"))[-1:]]


def temporaries(buffers: str) -> int:
    """Returns the bytes of temporaries in the chip's memory, from the text of a buffer assignment.

    Raises:
      ValueError: it names none.
    """
    sizes = [int(size) for size in _TEMPORARIES.findall(buffers)]
    if not sizes:
        raise ValueError("the compiler's buffer assignment names no preallocated-temp")
    return sum(sizes)
