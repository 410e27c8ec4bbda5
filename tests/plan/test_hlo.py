"""What a program exchanges between devices, counted from its text."""

from jax_refusal.plan.hlo import Collective, collectives

TEXT = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %inner = bf16[4,8]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %f = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %f)
}

%condition (s: (s32[], bf16[4,8])) -> pred[] {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%counted (s: (s32[])) -> pred[] {
  %twelve.1 = s32[]{:T(128)} constant(12)
  %s = (s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %twelve.1), direction=LT, metadata={op_name="lt"}
}

%endless (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %gathered = s32[16]{0} all-gather(%t), dimensions={0}
  ROOT %out = (s32[]) tuple(%i)
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p0), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %loop = (s32[], bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"80"}}
  %forever = (s32[]) while(%u), condition=%condition, body=%endless
  %known = (s32[]) while(%v), condition=%counted, body=%endless
  %both = (f32[2]{0}, f32[3]{0}) all-reduce(%q, %r), to_apply=%add
  ROOT %r = f32[8]{0} copy(%p0)
}
"""


def test_loops_count_as_often_as_they_turn() -> None:
    assert collectives(TEXT) == [
        Collective("all-reduce", "bf16[4,8]", 64, 80),  # inside a fusion, inside a loop
        # Of a loop of 12 turns, and of one whose turns nobody knows.
        Collective("all-gather", "s32[16]", 64, 12 + 1),
        Collective("all-gather", "f32[32]", 128, 1),  # of a pair of start and done
        Collective("all-reduce", "f32[2] + f32[3]", 20, 1),
    ]


def test_a_program_without_exchanges() -> None:
    assert collectives(TEXT.split("ENTRY")[0]) == []
