"""Collectives read from the text of a compiled program."""

from __future__ import annotations

import pytest

from visor_jax.planning.hlo import collectives

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%fused.1 (p: bf16[8,16]) -> bf16[64,16] {
  %g = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%fused.2 (p: bf16[8,16]) -> bf16[64,16] {
  %g.2 = bf16[64,16]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%cond (s: (s32[], f32[128])) -> pred[] {
  %limit = s32[] constant(24)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[128])) -> (s32[], f32[128]) {
  %a = bf16[64,16] fusion(%x), kind=kLoop, calls=%fused.1
  %b = bf16[64,16] fusion(%x), kind=kLoop, calls=%fused.2
  %r = f32[128]{0} all-reduce(%v), channel_id=8, to_apply=%add
}

%on (p: f32[128]) -> f32[128] {
  %permuted = (f32[128]{0}, f32[128]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=9
  %done = f32[128]{0} collective-permute-done(%permuted)
}

%off (p: f32[128]) -> f32[128] {
  ROOT %same = f32[128] copy(%p)
}

%unknown (s: (s32[])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %j), direction=LT
}

%rare (s: (s32[])) -> (s32[]) {
  %t = f32[16]{0} reduce-scatter(%v), channel_id=10, to_apply=%add
}

ENTRY %main (p0: f32[128]) -> f32[128] {
  %w = (s32[], f32[128]) while(%t0), condition=%cond, body=%body
  %c = f32[128] conditional(%pred, %p0, %p0), branch_computations={%off, %on}
  %w.2 = (s32[]) while(%t1), condition=%unknown, body=%rare
  %w.3 = (s32[]) while(%t2), condition=%unknown, body=%rare, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_loops_multiply_branches_count_once_and_spread_gathers_are_one() -> None:
    found = collectives(PROGRAM)
    assert found.counts == {"all-gather": 24, "all-reduce": 24, "collective-permute": 1, "reduce-scatter": 6}
    assert found.bytes == {
        "all-gather": 24 * 64 * 16 * 2,
        "all-reduce": 24 * 128 * 4,
        "collective-permute": 128 * 4,
        "reduce-scatter": 6 * 16 * 4,
    }
    assert found.waiting == 2 * 24 * 128 * 4 + 6 * 16 * 4  # neither the fused gathers nor the started permutation
    assert found.unknown_loops == 1
    assert found.total == sum(found.bytes.values())


@pytest.mark.parametrize("text", ["", "HloModule empty\n", "no program"])
def test_a_program_without_an_entry_has_none(text: str) -> None:
    assert collectives(text).total == 0
