"""What plans read from compiling processes: from a program before machine code, from a finished one, from a failure."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from visor_jax.errors import RequestError, RunError
from visor_jax.planning import compiling
from visor_jax.planning.compiling import CODE, compile_stage
from visor_jax.planning.dump import temporaries
from visor_jax.scale.topologies import GIB, parse_topology
from visor_jax.testing import tiny_config

PLACE = parse_topology("v5e:2x2")
BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 65470464, parameter 98, shape |u8[4,37,384,384,3]| at ShapeIndex {}:
allocation 2: size 2289222656, preallocated-temp:
 value: <4673 fusion.31 @0> (size=232783872,offset=2050539520): bf16[74,16,768,128]{3,2,1,0}
allocation 3: size 172, color 2, preallocated-temp:
"""
HLO = """HloModule jit_update_step

ENTRY %main (a: bf16[8]) -> bf16[32] {
  ROOT %gather = bf16[32]{0} all-gather(%a), channel_id=1
}
"""
PROLOGUE = """
import json, os, re, sys, time
request = json.load(open(sys.argv[1]))
folder = re.search(r"--xla_dump_to=(\\S+)", os.environ["XLA_FLAGS"])[1]
arguments = {"weights": 100, "optimizer": 20, "batch": 3}
def write(**found):
    open(request["out"], "w").write(json.dumps(found))
def dump():
    os.makedirs(folder)
    for name, text in (("_after_buffer_assignment", HLO), ("-buffer-assignment", BUFFERS)):
        open(f"{folder}/module_0.jit_update_step.after_optimizations{name}.txt", "w").write(text)
"""
BYTES = 2289222656


def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, *, machine_code: bool = False, limit: float = 30):
    """What a plan reads if `body` stands for the compiling process."""
    script = tmp_path / "process.py"
    script.write_text(f"HLO, BUFFERS = {HLO!r}, {BUFFERS!r}\n{PROLOGUE}\n{body}")
    monkeypatch.setattr(compiling, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(compiling, "POLL", 0.05)
    end = time.monotonic() + limit
    return compile_stage(tiny_config(), PLACE, "full", deadline=end, machine_code=machine_code)


def test_a_process_is_stopped_before_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result: Any = found(monkeypatch, tmp_path, "write(arguments=arguments); dump(); time.sleep(600)")
    assert result["temporaries"] == BYTES and result["total"] == 123 + BYTES + CODE and result["fits"]
    assert not result["machine_code"] and result["collectives"] == {"all-gather": {"count": 1, "bytes": 64.0}}


def test_with_machine_code_its_bytes_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = 'dump(); time.sleep(0.3); write(arguments=arguments, result={"fits": True, "code": 7})'
    result: Any = found(monkeypatch, tmp_path, body, machine_code=True)
    assert result["machine_code"] and result["total"] == 123 + BYTES + 7


def test_what_does_not_fit_is_the_compilers_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = f'write(arguments=arguments, result={{"fits": False, "total": {20 * GIB}, "limit": {16 * GIB}}})'
    result: Any = found(monkeypatch, tmp_path, body)
    assert not result["fits"] and result["total"] == 20 * GIB and "temporaries" not in result


def test_without_time_there_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found(monkeypatch, tmp_path, "write(arguments=arguments); time.sleep(600)", limit=0.3) is None


def test_failures_of_the_process_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--topology=v5e:2x2: the compiler failed: .*no such kernel"):
        found(monkeypatch, tmp_path, 'sys.exit("no such kernel")')
    with pytest.raises(RequestError, match="--topology=v5e:2x2: not this shape"):
        found(monkeypatch, tmp_path, 'write(refused="not this shape")')


def test_a_buffer_assignment_of_another_form_is_not_taken_for_zero() -> None:
    assert temporaries(BUFFERS) == BYTES
    with pytest.raises(ValueError, match="preallocated-temp"):
        temporaries("BufferAssignment:\nallocation 0: size 512, thread-local:\n")
