"""Reading the text of compiled programs: pieces by hand, and what XLA's CPU backend writes."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowrl_jax.planning import hlo
from flowrl_jax.planning.buffers import held, largest, moved_bytes, with_axes
from flowrl_jax.planning.collectives import Traffic, axes_of, bytes_by_axes, device_groups, traffic
from flowrl_jax.planning.operations import branch_weight, kernel_flops, matmul_flops

AXES, SHAPE = ("data", "fsdp", "tensor"), (2, 2, 2)


def read(text: str) -> tuple[hlo.Module, list[hlo.Executed]]:
    module = hlo.parse("HloModule test, is_scheduled=true\n\n" + textwrap.dedent(text))
    return module, list(hlo.executed(module, branch_weight(module)))


def entry(lines: str, others: str = "") -> tuple[hlo.Module, list[hlo.Executed]]:
    """A module whose entry computation has these lines."""
    body = textwrap.indent(textwrap.dedent(lines).strip(), "  ")
    return read(f"{textwrap.dedent(others).strip()}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


LOOP = """
%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %product = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %result = (s32[], f32[8,8]{1,0}) tuple(%next, %product)
}

%condition (given: (s32[], f32[8,8])) -> pred[] {
  %given = (s32[], f32[8,8]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%given), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %again = pred[] compare(ORDER), direction=DIRECTION
}
"""
START = """
%start = s32[] constant(FROM)
%ones = f32[8,8]{1,0} parameter(0)
%tuple = (s32[], f32[8,8]{1,0}) tuple(%start, %ones)
%loop = (s32[], f32[8,8]{1,0}) while(%tuple), condition=%condition, body=%bodyCONFIG
"""


def loop(limit=5, start=0, order="%at, %limit", direction="LT", config=""):
    others = LOOP.replace("LIMIT", str(limit)).replace("ORDER", order)
    others = others.replace("DIRECTION", direction)
    return entry(START.replace("FROM", str(start)).replace("CONFIG", config), others)


@pytest.mark.parametrize(
    "rounds, given",
    [
        (5, {}),
        (3, {"start": 2}),
        (6, {"direction": "LE"}),
        (5, {"order": "%limit, %at", "direction": "GT"}),
        (0, {"start": 9}),
        (7, {"config": ', backend_config={"known_trip_count":{"n":"7"},"other":{}}'}),
        (1, {"direction": "NE"}),  # not understood: counted once, and said
    ],
)
def test_what_is_in_a_loop_counts_as_often_as_it_runs(rounds, given):
    module, program = loop(**given)
    assert matmul_flops(program) == rounds * 2 * 8 * 8 * 8
    assert hlo.unknown_loops(module, program) == (["loop"] if "NE" in given.values() else [])
    (product,) = (e for e in program if e.instruction.opcode == "dot")
    assert product.times == rounds and product.loops == ("loop",)


def test_a_loop_whose_condition_is_fused():
    others = LOOP.replace(
        "  %limit = s32[] constant(LIMIT)\n"
        "  ROOT %again = pred[] compare(ORDER), direction=DIRECTION",
        "  %limit = s32[] constant(4)\n"
        "  ROOT %again = pred[] fusion(%at, %limit), kind=kLoop, calls=%fused_compare",
    ).replace(
        "%condition (",
        "%fused_compare (a: s32[], b: s32[]) -> pred[] {\n"
        "  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n"
        "  ROOT %less = pred[] compare(%a, %b), direction=LT\n}\n\n%condition (",
    )
    _, program = entry(START.replace("FROM", "1").replace("CONFIG", ""), others)
    assert matmul_flops(program) == 3 * 2 * 8 * 8 * 8


def test_the_heaviest_branch_of_a_conditional_counts():
    branch = """
    %{name} (x.{name}: f32[8,8]) -> f32[8,8] {{
      %x.{name} = f32[8,8]{{1,0}} parameter(0)
      ROOT %y.{name} = f32[8,8]{{1,0}} {line}
    }}
    """
    dot = "dot(%x.heavy, %x.heavy), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    others = branch.format(name="light", line="negate(%x.light)")
    others += branch.format(name="heavy", line=dot)
    for names in ("light, %heavy", "heavy, %light"):
        lines = f"""
        %p = s32[] parameter(0)
        %x = f32[8,8]{{1,0}} parameter(1)
        %c = f32[8,8]{{1,0}} conditional(%p, %x, %x), branch_computations={{%{names}}}
        """
        assert matmul_flops(entry(lines, others)[1]) == 2 * 8**3


# A convolution's operations, and the matrix product that the TPU compiler writes it for.
@pytest.mark.parametrize(
    "result, left, right, window, labels, flops",
    [
        ("f32[16,32]", "f32[16,64]", "f32[64,32]", "", "bf_io->bf", 2 * 16 * 32 * 64),
        ("f32[4,8,6]", "f32[4,8,5]", "f32[5,6,1]", "{size=1}", "0bf_io0->0bf",
         2 * 4 * 8 * 6 * 5),
        # Heads as the window of a kernel that is turned: only its middle meets the one element.
        ("f32[10,7,3]", "f32[10,5,1]", "f32[7,3,5]", "{size=7 pad=6_6 rhs_reversal=1}",
         "bf0_0oi->b0f", 2 * 10 * 7 * 3 * 5),
        # Summed over heads: as many weights as elements, one place.
        ("f32[10,5,1]", "f32[10,7,3]", "f32[7,3,5]", "{size=7}", "b0f_0io->bf0",
         2 * 10 * 5 * 7 * 3),
        # A batch as a window that jumps from row to row.
        ("f32[4,8,6]", "f32[4,8,5]", "f32[4,6,5]", "{size=4 stride=3 pad=0_0 lhs_dilate=4}",
         "0bf_0oi->0bf", 2 * 4 * 8 * 6 * 5),
    ],
)  # fmt: skip
def test_convolutions_are_matrix_products(result, left, right, window, labels, flops):
    window = f", window={window}" if window else ""
    _, program = entry(f"""
        %a = {left}{{1,0}} parameter(0)
        %b = {right}{{1,0}} parameter(1)
        %c = {result}{{1,0}} convolution(%a, %b){window}, dim_labels={labels}
    """)
    assert matmul_flops(program) == flops


def test_a_fused_product_has_no_memory_and_counts_all_the_same():
    others = """
    %fused (p0: bf16[4,8], p1: bf16[8,2]) -> bf16[4,2] {
      %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
      %p1 = bf16[8,2]{1,0:T(8,128)(2,1)} parameter(1)
      %wide = f32[4,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT %narrow = bf16[4,2]{1,0} convert(%wide)
    }
    """
    module, program = entry(
        """
        %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
        %b = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} parameter(1)
        %f = bf16[4,2]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused
        """,
        others,
    )
    assert matmul_flops(program) == 2 * 4 * 8 * 2
    assert {shape.dtype for shape in held(program)} == {"bf16"}
    # %b is in small memory: it is not read from the large one.
    assert moved_bytes(module, program) == 2 * (4 * 8 + 4 * 2)
    assert largest(program, 1) == [("bf16[4,8]", 64.0)]
    assert with_axes(held(program), (8, 4)) and not with_axes(held(program), (8, 8))


def test_slices_and_updates_in_place_move_no_more_than_the_slice():
    others = """
    %update (p0: f32[100,8], p1: f32[1,8], p2: s32[]) -> f32[100,8] {
      %p0 = f32[100,8]{1,0} parameter(0)
      %p1 = f32[1,8]{1,0} parameter(1)
      %p2 = s32[] parameter(2)
      %zero = s32[] constant(0)
      ROOT %dus = f32[100,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
    }
    """
    module, program = entry(
        """
        %a = f32[100,8]{1,0} parameter(0)
        %row = f32[1,8]{1,0} parameter(1)
        %at = s32[] parameter(2)
        %zero = s32[] constant(0)
        %f = f32[100,8]{1,0} fusion(%a, %row, %at), kind=kLoop, calls=%update
        %slice = f32[1,8]{1,0} dynamic-slice(%f, %at, %zero), dynamic_slice_sizes={1,8}
        """,
        others,
    )
    assert moved_bytes(module, program) == (32 + 4 + 32) + 2 * 32


def test_a_slice_for_small_memory_is_read_from_the_large_one():
    module, program = entry(
        """
        %a = f32[100,8]{1,0} parameter(0)
        %at = s32[] parameter(1)
        %zero = s32[] constant(0)
        %near = f32[10,8]{1,0:S(1)} slice(%a), slice={[0:10], [0:8]}
        %row = f32[1,8]{1,0:S(1)} slice(%near), slice={[0:1], [0:8]}
        %update = f32[100,8]{1,0} dynamic-update-slice(%a, %row, %at, %zero)
        """
    )
    assert moved_bytes(module, program) == 4 * 10 * 8 + 0 + 4 * 8


KERNEL = """
%q = bf16[3,4,1024,128]{{3,2,1,0}} parameter(0)
%t = s8[1,4,4]{{2,1,0}} parameter(1)
%kernel.{name}.7 = bf16[3,4,1024,128]{{3,2,1,0}} custom-call(%t, %t, %q, %q, %q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,4,{width}]{{2,1,0}}, \
s8[1,4,{width}]{{2,1,0}}, bf16[3,4,1024,128]{{3,2,1,0}}, bf16[3,2,1024,128]{{3,2,1,0}}}}, \
frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 256, \\"block_kv\\": 256, \\"block_q_dkv\\": 256, \
\\"block_kv_dkv\\": 256, \\"block_q_dq\\": 256, \\"block_kv_dq\\": 256, \
\\"use_fused_bwd_kernel\\": false}}"
}}}}, metadata={{op_name="jit(f)/x"}}, backend_config={{"custom_call_config":{{{config}}}}}
%after = f32[2]{{0}} parameter(2)
"""


@pytest.mark.parametrize("name, products", [("fwd", 2), ("dq", 3), ("dkv", 4)])
@pytest.mark.parametrize("width, blocks", [(4, 10), (2, 7)])
def test_splash_attention_is_counted_by_its_blocks(name, products, width, blocks):
    """A causal mask leaves 10 of 16 blocks, a window of two blocks 7."""
    text = KERNEL.format(name=f"splash_mha_{name}_segmented", width=width, config="")
    if name == "dkv":  # its table lists queries for each block of keys
        text = text.replace(f"s8[1,4,{width}]", f"s8[1,{width},4]")
    _, program = entry(text)
    flops = 2 * products * blocks * 256 * 256 * 128 * 4 * 3
    assert kernel_flops(program) == (flops, ())
    assert "after" in {e.instruction.name for e in program}


def test_other_kernels_say_what_they_cost_or_are_named():
    estimate = '"cost_estimate":{"transcendentals":"5","flops":"123","bytes_accessed":"9"}'
    module, program = entry(KERNEL.format(name="mine", width=4, config=estimate))
    assert kernel_flops(program) == (123, ()) and moved_bytes(module, program) == 9
    text = KERNEL.format(name="mine", width=4, config="")
    assert kernel_flops(entry(text)[1]) == (0.0, ("kernel.mine",))


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": "tensor",
    "replica_groups=[4,2]<=[8]": "tensor",
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": "fsdp",
    "replica_groups=[2,4]<=[8]": "fsdp+tensor",
    "replica_groups={}": "data+fsdp+tensor",
    "replica_groups=mesh['a'=2,'b'=4] {'a'}": "data",
    "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": "tensor",
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]<=[4,2]T(1,0)) {'b'}": "data+fsdp",
    "source_target_pairs={{0,4},{4,0},{1,1}}": "data",
    "source_target_pairs={{0,0},{1,1}}": "none",
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_are_axes_of_the_mesh(text):
    instruction = hlo.Instruction("c", (), "all-gather", (), "", f", channel_id=1, {text}, x=1")
    assert axes_of(device_groups(instruction, 8), AXES, SHAPE) == GROUPS[text]


def test_groups_that_are_not_understood_are_an_error():
    instruction = hlo.Instruction("c", (), "all-gather", (), "", ", replica_groups=?")
    with pytest.raises(ValueError, match="not understood"):
        device_groups(instruction, 8)


@pytest.mark.parametrize(
    "line, kind, received",
    [
        ("f32[64]{0} all-gather(%x), GROUPS", "all-gather", 3 * 64),
        ("(f32[16]{0}, f32[64]{0}) all-gather-start(%x), GROUPS", "all-gather", 3 * 64),
        ("f32[4]{0} reduce-scatter(%x), GROUPS", "reduce-scatter", 48),
        ("f32[16]{0} all-reduce(%x), GROUPS", "all-reduce", 96),
        ("f32[16]{0} all-to-all(%x), GROUPS", "all-to-all", 48),
        ("f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 64),
        ("f32[16]{0} collective-permute(%x), source_target_pairs={{0,0}}",
         "collective-permute", 0),
    ],
)  # fmt: skip
def test_bytes_that_a_device_receives(line, kind, received):
    """16 floats on each device, in groups of four."""
    groups = line.replace("GROUPS", "replica_groups=[2,4]<=[8]")
    _, program = entry(f"%x = f32[16]{{0}} parameter(0)\n%c = {groups}")
    (found,) = traffic(program, AXES, SHAPE)
    waiting = 0 if "-start" in line else received
    assert found == Traffic(kind, found.axes, 1, received, 0, waiting)
    if received and kind != "collective-permute":
        assert bytes_by_axes([found, found]) == {"fsdp+tensor": 2 * received}


@pytest.mark.parametrize(
    "kind, received", [("ALL_REDUCE", 2 * 48), ("ALL_GATHER", 48), ("REDUCE_SCATTER", 3 * 64)]
)
def test_collectives_between_slices_are_receives(kind, received):
    """16 floats arrive; four slices take part, which lie along the mesh's first axis."""
    attributes = (
        f'is_host_transfer=true, frontend_attributes={{_xla_megascale_target="{{1,3:5}}x{{0:3}}",'
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    _, program = entry(f"""
        %token = token[] after-all()
        %r = (f32[16]{{0}}, u32[], token[]) recv(%token), channel_id=1, {attributes}
        %done = (f32[16]{{0}}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true
        %other = (f32[16]{{0}}, u32[], token[]) recv(%token), channel_id=2
    """)
    name = kind.lower().replace("_", "-")
    assert traffic(program, AXES, SHAPE) == (Traffic(name, "data", 1, received, 0, 0),)


def test_a_reduce_scatter_of_the_tpu_compiler_is_one():
    """It is written as a fusion of an all-reduce and a slice; here in a loop of three."""
    others = LOOP.replace("LIMIT", "3").replace("ORDER", "%at, %limit").replace("DIRECTION", "LT")
    others = others.replace(
        "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1",
    )
    others += """
%all-reduce-scatter.clone.1 (input: f32[8,8]) -> f32[4,8] {
  %input = f32[8,8]{1,0} parameter(0)
  %sum = f32[8,8]{1,0} all-reduce(%input), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %part = f32[4,8]{1,0} slice(%sum), slice={[0:4], [0:8]}
}
"""
    _, program = entry(START.replace("FROM", "0").replace("CONFIG", ""), others)
    (found,) = traffic(program, AXES, SHAPE)
    assert found == Traffic("reduce-scatter", "tensor", 3, 3 * 128, 3 * 128, 3 * 128)


def test_a_collective_beside_a_product_is_one():
    """The TPU compiler writes it where it starts, with the product, and where it ends."""
    names = ("start", "async_collective_fusion.7", "done")
    gather = "%g = f32[64]{0} all-gather(%input), replica_groups=[2,4]<=[8]"
    ends = ("custom-call(%g), custom_call_target=\"AsyncCollectiveStart\"", "copy(%g)",
            "custom-call(%g), custom_call_target=\"AsyncCollectiveDone\"")  # fmt: skip
    others = "".join(
        f"\n%{name} (input: f32[16]) -> f32[64] {{\n  %input = f32[16]{{0}} parameter(0)\n"
        f"  {gather}\n  ROOT %out = f32[64]{{0}} {end}\n}}\n"
        for name, end in zip(names, ends, strict=True)
    )
    lines = ["%x = f32[16]{0} parameter(0)"]
    lines += [
        f"%{letter} = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%{name}"
        for letter, name in zip("abc", names, strict=True)
    ]
    _, program = entry("\n".join(lines), others)
    assert traffic(program, AXES, SHAPE) == (Traffic("all-gather", "fsdp+tensor", 1, 3 * 64, 0, 0),)


def test_aliases_and_shapes_of_the_header_are_read():
    text = (
        "HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, must-alias) },"
        " entry_computation_layout={(f32[2]{0})->f32[2]{0}}\n\n"
        "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n"
    )
    assert hlo.parse(text).aliased == {0, 3}
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")
    (shape,) = hlo.parse(text).computations["main"].instructions["p"].shapes
    assert shape.dims == (2,) and shape.bytes == 8


def test_text_of_the_cpu_compiler():
    """A sharded loop of products: operations of one device, and the gathers of each round."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("rows", "columns"),
                axis_types=(AxisType.Auto,) * 2)  # fmt: skip
    put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def rounds(x, weights):
        def step(x, weight):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ weight, put("rows", None))), None

        return jax.lax.scan(step, x, weights)[0]

    compiled = (
        jax.jit(rounds, out_shardings=put("rows", None))
        .lower(
            jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=put("rows", None)),
            jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=put(None, None, "columns")),
        )
        .compile()
    )
    module = hlo.parse(compiled.as_text())
    program = list(hlo.executed(module, branch_weight(module)))
    found = traffic(program, ("rows", "columns"), (2, 4))
    # Weights are gathered, each round; every device then computes its 8 rows whole.
    assert matmul_flops(program) == 5 * 2 * 8 * 32 * 32
    assert bytes_by_axes(found) == {"columns": 5 * 3 * 32 * 8 * 4}
    assert [one.count for one in found] == [5]
