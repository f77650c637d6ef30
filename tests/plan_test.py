"""Planning: what is counted by formula, what is refused, and what would fit instead."""

import dataclasses
import importlib.util
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import math_7b, test_tiny
from flowrl_jax import plan as module
from flowrl_jax.config import Config, parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import LoraConfig, TransformerConfig
from flowrl_jax.plan import NAMES, plan, table
from flowrl_jax.planning import chips
from flowrl_jax.planning.chips import CHIPS, GIB, Absent, Topology, describe
from flowrl_jax.planning.collectives import Traffic
from flowrl_jax.planning.formulas import model_flops
from flowrl_jax.planning.measure import measure
from flowrl_jax.planning.memory import device_bytes, estimated_bytes, resident_bytes
from flowrl_jax.planning.programs import Program, planned_learner, programs
from flowrl_jax.planning.search import changed, last_true, micro_batches, slices
from flowrl_jax.planning.shapes import PUBLISHED, planned_shape
from flowrl_jax.planning.times import estimate, link_rate

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)
TINY = ["--config=configs/test_tiny.py"]


def absent(count: int) -> list[Absent]:
    """Devices of which only the number counts."""
    return [Absent(number, "any", platform="tpu") for number in range(count)]


def seven_billion(**mesh: int) -> Config:
    config = math_7b.get_config()
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    config.mesh.update(mesh)
    config.train.micro_batch_size = -1
    return parse_config(config)


def test_published_shapes_are_the_published_sizes():
    sizes = {name: round(shape.num_parameters / 1e9, 2) for name, shape in PUBLISHED.items()}
    assert sizes == {
        "Qwen2.5-7B": 7.62, "Qwen2.5-32B": 32.76, "DeepSeek-R1-Distill-Qwen-7B": 7.62,
    }  # fmt: skip


def test_a_model_is_known_by_its_folders_name():
    config = parse_config(math_7b.get_config())
    assert planned_shape(config.model, 64).num_layers == 28
    other = math_7b.get_config()
    other.model.path = "models/Qwen9-1T"
    with pytest.raises(InputError, match="no shape is known by the name Qwen9-1T"):
        planned_shape(parse_config(other).model, 64)


def test_operations_against_a_count_by_hand():
    """One layer, so small that every product can be written down."""
    shape = TransformerConfig(10, 1, 4, 2, 1, 2, 6, tie_embeddings=False)
    program = Program("score", build=lambda: (None, ()), layout=SimpleNamespace(), rows=1,
                      columns=8, trips=1, runs=1, attention="xla")  # fmt: skip
    attention = 4 * 2 * 2 + 4 * 1 * 2 * 2 + 2 * 2 * 4  # query, key and value, out
    layer = attention + 3 * 4 * 6 + 3 * 4  # mlp, norms
    pairs = 4 * (8 / 2) * 2 * 2
    assert model_flops(shape, program, 8) == 8 * (2 * (layer + 4 * 10) + pairs)
    learned = dataclasses.replace(program, backward=True)
    assert model_flops(shape, learned, 8) == 3 * model_flops(shape, program, 8)
    adapted = dataclasses.replace(shape, lora=LoraConfig(rank=2))  # frozen: no gradient of weights
    assert model_flops(adapted, learned, 8) == 8 * (2 * 2 * (layer + 4 * 10) + 3 * pairs)
    read = dataclasses.replace(program, name="prefill")
    assert model_flops(shape, read, 8) == 8 * (2 * layer + pairs)
    decoded = dataclasses.replace(program, name="decode", rows=3, columns=1)
    assert model_flops(shape, decoded, 8) == 3 * (2 * (layer + 4 * 10) + 4 * 8 * 2 * 2)


def test_memory_by_formula_is_what_compiled_programs_needed():
    """GiB of 7B train steps, one response of 10,240 tokens a shard, as the compiler gave them."""
    for count, mesh, compiled in (
        (8, {}, 19.6),
        (8, {"tensor": 2}, 18.5),
        (16, {}, 11.9),
    ):
        config = seven_billion(**mesh)
        learner = planned_learner(config, absent(count))
        found = {p.name: estimated_bytes(p, learner) for p in programs(config, learner)}
        arguments, beside = found["train_step"]
        # Weights and moments, and a head for log Z that every device holds whole.
        assert 12 * 7.6e9 / count < arguments < 12 * 7.7e9 / count + 5e8
        assert (arguments + beside) / (compiled * GIB) == pytest.approx(1, abs=0.06)


def test_what_stays_on_a_device_beside_a_program():
    """Train state and reference while responses are sampled; adapters come without a copy."""
    config = seven_billion()
    learner = planned_learner(config, absent(8))
    found = resident_bytes(config, learner)
    policy = 4 * 7.6156e9 / 8
    assert found["train_step"] == pytest.approx(policy / 2, rel=0.01)  # the reference, in bfloat16
    assert found["decode"] == pytest.approx(3.5 * policy, rel=0.04)  # and weights and moments
    assert found["prefill"] == found["score"] == pytest.approx(2.5 * policy, rel=0.04)  # log Z
    adapters = math_7b.get_config()
    adapters.model.lora.rank = 8
    config = parse_config(adapters)
    found = resident_bytes(config, planned_learner(config, absent(8)))
    assert found["train_step"] == 0 and found["decode"] > policy / 2
    # Beside the frozen weights in bfloat16, adapters and log Z's head with their moments.
    assert found["decode"] - policy / 2 == pytest.approx(0.5e9, rel=0.05)


@pytest.mark.parametrize(
    "setting, less",
    [
        ({"optimizer.moments": "bfloat16"}, 0.0),  # gradients are in float32 all the same
        ({"model.attention": "cudnn"}, 10 * 28 * 512 * 10_240),  # no scores of 512 queries
    ],
)
def test_what_lives_beside_a_train_step_by_formula(setting, less):
    def beside(config):
        learner = planned_learner(config, describe("h100:8").devices)
        (step,) = [p for p in programs(config, learner) if p.name == "train_step"]
        return estimated_bytes(step, learner)[1]

    plain, other = seven_billion(), changed(seven_billion(), setting)
    assert beside(plain) - beside(other) == pytest.approx(less)


def test_bytes_on_a_device_follow_the_sharding():
    layout = planned_learner(seven_billion(), absent(8)).layout
    cut = jax.ShapeDtypeStruct((16, 3), np.float32, sharding=layout.batch)
    whole = jax.ShapeDtypeStruct((5,), np.int16, sharding=layout.replicated)
    assert device_bytes({"a": cut, "b": [whole]}) == 16 * 3 * 4 / 8 + 5 * 2


@dataclasses.dataclass(frozen=True)
class Placed(Absent):
    """A device with a place in a grid."""

    coords: tuple[int, ...] = ()
    slice_index: int = 0


def grid_mesh(chip: str, grid: tuple[int, ...], shape: tuple[int, ...], slices: int = 1) -> Mesh:
    """A mesh over chips with places in a grid, in the order of the compiler."""
    places = [(s, *reversed(c)) for s in range(slices) for c in np.ndindex(*reversed(grid))]
    devices = np.empty(len(places), object)
    for number, (slice_index, *coords) in enumerate(places):
        devices[number] = Placed(number, chip, "tpu", 0, tuple(coords), slice_index)
    return Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"))


def test_rates_of_links_follow_the_grid():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    link = v5e.links / 4
    # Along one axis of 4 chips that is no ring, along both, around a whole pod's axis.
    assert link_rate(v5e, grid_mesh("v5e", (4, 4), (1, 4, 4)), "tensor") == link
    assert link_rate(v5e, grid_mesh("v5e", (4, 4), (1, 16, 1)), "fsdp") == 2 * link
    assert link_rate(v5e, grid_mesh("v5e", (16, 2), (1, 2, 16)), "tensor") == 2 * link
    assert link_rate(v5e, grid_mesh("v5e", (16, 2), (1, 2, 16)), "fsdp") == link
    assert link_rate(v5p, grid_mesh("v5p", (2, 2, 2), (1, 8, 1)), "fsdp") == v5p.links / 2
    assert link_rate(v5p, grid_mesh("v5p", (4, 4, 4), (1, 64, 1)), "fsdp") == v5p.links
    two = grid_mesh("v5p", (2, 2, 1), (2, 4, 1), slices=2)
    assert link_rate(v5p, two, "data") == link_rate(v5p, two, "data+fsdp") == v5p.network
    assert link_rate(v5p, two, "fsdp") == v5p.links / 3
    nodes = Mesh(np.array(absent(16), object).reshape(2, 8, 1), ("data", "fsdp", "tensor"))
    assert link_rate(CHIPS["h100"], nodes, "fsdp") == CHIPS["h100"].links
    assert link_rate(CHIPS["h100"], nodes, "data") == CHIPS["h100"].network


def test_what_waits_is_added_and_what_overlaps_is_hidden():
    chip = CHIPS["v5p"]
    mesh = grid_mesh("v5p", (2, 2, 1), (1, 4, 1))
    rate = chip.links / 3
    over = Traffic("all-gather", "fsdp", 1, bytes=3 * rate, loop_bytes=0, waiting_bytes=0.5 * rate)
    found = estimate(2 * chip.flops, chip.bandwidth, [over], chip, mesh)
    assert (found.compute, found.memory) == (2, 1)
    assert found.network == pytest.approx(3) and found.total == pytest.approx(2.5 + 0.5)
    assert estimate(2 * chip.flops, chip.bandwidth, [], chip, mesh).total == 2


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_last_that_fits_is_found_with_few_questions(count):
    for last in range(-1, count):
        for guess in range(-1, count + 1):
            asked: list[int] = []

            def fits(at: int, last: int = last, asked: list[int] = asked) -> bool:
                asked.append(at)
                return at <= last

            assert last_true(count, guess, fits) == (None if last < 0 else last)
            assert len(set(asked)) == len(asked)
            if guess == last:
                assert len(asked) <= 2
    assert last_true(0, 0, lambda at: True) is None
    far: list[int] = []
    assert last_true(200, 0, lambda at: far.append(at) or at <= 170) == 170
    assert len(far) <= 16


def test_sizes_that_can_be_tried():
    config = seven_billion()
    eight = Topology("any", CHIPS["h100"], tuple(absent(8)))
    assert micro_batches(config, eight) == [8, 16, 32, 64, 128, 256]
    assert slices(describe("h100:8"), 16)[:2] == ["h100:16", "h100:32"]
    other = changed(config, {"train.micro_batch_size": 4, "mesh.fsdp": 2})
    assert (other.train.micro_batch_size, other.mesh.fsdp) == (4, 2)
    assert config.mesh.fsdp == -1


@pytest.mark.slow
def test_gpus_are_estimated_and_say_so(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [*TINY, "--topology=h100:8", "--search", f"--json={file}"]
    assert module.main(arguments) == 0
    found = json.loads(file.read_text())
    assert found["estimated"] and found["fits"] and list(found["programs"]) == list(NAMES)
    assert all(program["estimated"] for program in found["programs"].values())
    assert found["search"]["smallest_slice"]["settings"]["topology"] == "h100:1"
    assert found["search"]["largest_micro_batch"]["settings"] == {"train.micro_batch_size": 16}
    assert found["step_seconds"] > 0 and "nothing was compiled" in " ".join(found["assumptions"])
    shown = capsys.readouterr()
    assert "ESTIMATED by formulas, not compiled" in shown.out and not shown.err


@pytest.mark.parametrize(
    ("changes", "columns", "starts"),
    [
        ({}, 8960, 8),  # 8292, and 512 more where rows wait: a multiple of what the kernel reads
        ({"rollout.cache": "int8"}, 8548, 64),  # attended to by XLA: the last of several stages
        ({"model.decode_kernel": "xla"}, 8548, 64),
    ],
)
def test_gpus_decode_in_the_columns_that_their_kernel_wants(changes, columns, starts):
    sizes = {"rollout.max_prompt_length": 100, "rollout.slots": 64}
    config = changed(seven_billion(), sizes | changes)
    learner = planned_learner(config, describe("h100:8").devices)
    (decode,) = [program for program in programs(config, learner) if program.name == "decode"]
    _, (_, slots, prompts) = decode.build()
    assert slots.caches[0].value.shape == (64, 4, columns, 128)
    assert prompts.length.shape == (starts,)  # groups of 8 start from a prompt, or rows go on


def test_a_kernel_of_other_chips_is_refused(capsys):
    arguments = [*TINY, "--topology=h100:8", "--config.model.decode_kernel=pallas"]
    assert module.main(arguments) == 2
    assert "'pallas' is a kernel for TPUs, and this is a GPU" in capsys.readouterr().err


def test_what_does_not_fit_says_by_how_much_and_what_would():
    found = plan(seven_billion(), "h100:1", ["train_step"])
    step = found["programs"]["train_step"]
    assert not found["fits"] and not step["fits"]
    assert step["peak_bytes"] + step["resident_bytes"] > CHIPS["h100"].memory
    last = found["suggestions"][-1]
    assert last["settings"] == {"topology": "h100:2", "train.micro_batch_size": -1}
    assert last["fits"] and last["estimated"] and last["needed_bytes"] < CHIPS["h100"].memory
    text = table(found)
    over = (step["peak_bytes"] + step["resident_bytes"] - CHIPS["h100"].memory) / GIB
    assert f"{over:.1f} GiB too many" in text or f"{over:.0f} GiB too many" in text
    assert "Would fit, by an estimate: --topology=h100:2" in text
    # As suggested it does fit.
    assert plan(seven_billion(), "h100:2", ["train_step"])["fits"]


def test_a_smaller_micro_batch_is_suggested_where_it_is_enough():
    config = changed(seven_billion(), {"train.micro_batch_size": 256})
    found = plan(config, "h100:8", ["train_step"])
    assert not found["fits"]
    first = found["suggestions"][0]["settings"]
    assert list(first) == ["train.micro_batch_size"]
    assert plan(changed(config, first), "h100:8", ["train_step"])["fits"]
    larger = {"train.micro_batch_size": 2 * first["train.micro_batch_size"]}
    assert not plan(changed(config, larger), "h100:8", ["train_step"])["fits"]


@pytest.mark.parametrize(
    "text, needed",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.8G of 31.2G hbm. X",
         34.8),
        ("E1000: the total memory required for HLO temporaries (384.50G) exceeds available HBM"
         " (7.48G). HLO module: jit_step.", 384.5),
        ("INTERNAL: Mosaic failed to compile\nsome kernel", 0.0),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_program_it_refuses(text, needed, monkeypatch):
    config = seven_billion()
    learner = planned_learner(config, absent(8))
    program = next(p for p in programs(config, learner) if p.name == "train_step")

    def refuse(self):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(Program, "lower", refuse)
    topology = Topology("v5p:2x2x2", CHIPS["v5p"], tuple(absent(8)))
    found = measure(program, learner, topology, resident=0.0, length=10_240)
    assert not found.fits and found.peak_bytes == needed * GIB
    assert "\n" not in found.message and found.message
    assert (found.argument_bytes > 0) == (needed > 0)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p-128", "", "h100", "h100:0", "h100:x"])
def test_unknown_topologies_name_known_ones(topology, capsys):
    assert module.main([*TINY, f"--topology={topology}"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and ("v5p:2x2" in message or "h100:8" in message)


def test_a_grid_that_the_compiler_refuses_lists_those_it_knows(monkeypatch):
    def ask(name: str, slices: int) -> tuple:
        if name not in ("v5e:2x2", "v5e:2x4"):
            raise RuntimeError("no such grid")
        return tuple(absent(4 * slices))

    monkeypatch.setattr(chips, "_ask", ask)
    assert describe("v5e:2x2", slices=2).count == 8
    with pytest.raises(InputError, match=r"no such grid\); it knows v5e:2x2, v5e:2x4$"):
        describe("v5e:3x3")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=h100:8", "--programs=x"], "--programs=x: not known"),
        (["--topology=h100:8", "--slices=0"], "--slices=0 must be at least 1"),
        (["--topology=h100:8", "--config.mesh.tensor=3"], "choose sizes whose product is 8"),
        (["--topology=h100:8", "--config.mesh.data=2", "--config.mesh.fsdp=2"], "fit 8 devices"),
        (["--topology=h100:3"], "choose a"),
        (["--topology=h100:16", "--config.rollout.group_size=2"], "choose a multiple"),
        (["--topology=h100:8", "--config.model.attention=splash"], "is a kernel for TPUs: set"),
        (["--topology=h100:8", "--config.model.num_kv_heads=3"], "num_kv_heads"),
        (["--topology=h100:8", "--json=no/folder/plan.json"], "the folder is missing"),
        ([], "--topology is missing"),
    ],
)
def test_what_cannot_be_is_one_line(flags, message, capsys):
    assert module.main([*TINY, *flags]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown and "\n" not in shown


@compiler
@pytest.mark.slow
def test_every_program_compiles_for_chips_that_are_not_there(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--config.rollout.max_response_length=120", "--topology=v5e:2x2"]
    assert module.main([*TINY, *arguments, f"--json={file}"]) == 0
    found = json.loads(file.read_text())
    assert list(found["programs"]) == list(NAMES) and found["fits"] and not found["estimated"]
    assert found["devices"] == 4 and found["model"]["attention"] == "splash"
    step = found["programs"]["train_step"]
    assert step["alias_bytes"] == step["state_bytes"] > 0.9 * (step["argument_bytes"] - 1e5)
    assert step["flops"] > step["kernel_flops"] > 0 and not step["uncounted_kernels"]
    assert set(step["collective_bytes"]) == {"fsdp"} and step["collective_bytes"]["fsdp"] > 0
    assert found["step_seconds"] > 0
    shown = capsys.readouterr()
    assert "train_step" in shown.out and "TPU_ACCELERATOR_TYPE" not in shown.err


@compiler
@pytest.mark.slow
def test_the_compiler_confirms_what_fits():
    """A vocabulary so large that one chip cannot hold it, but two and more can."""
    config = test_tiny.get_config()
    config.model.update(vocab_size=4_000_000, embed_dim=256, num_layers=1, dtype="bfloat16")
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    config.train.micro_batch_size = -1
    found = plan(parse_config(config), "v5e:1x1", ["train_step"], search=True)
    assert not found["fits"] and found["programs"]["train_step"]["peak_bytes"] > 16 * GIB
    assert found["search"]["largest_micro_batch"] is None
    choice = found["search"]["smallest_slice"]
    assert choice["settings"]["topology"] == "v5e:2x2"
    assert choice["fits"] and not choice["estimated"]
