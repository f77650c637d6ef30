"""What the TPU compiler makes of the programs of a run: facts read from the compiled text.

The sizes are such that an axis of the sequence, of the vocabulary or of the cache is known by its
length wherever it turns up.
"""

import dataclasses
import importlib.util
import os

import pytest

from configs import test_tiny
from flowrl_jax.config import Config, parse_config
from flowrl_jax.planning.buffers import held, with_axes
from flowrl_jax.planning.chips import describe
from flowrl_jax.planning.collectives import kind_of
from flowrl_jax.planning.hlo import Executed
from flowrl_jax.planning.measure import Compiled, compile_program, padded_bytes
from flowrl_jax.planning.memory import estimated_bytes
from flowrl_jax.planning.operations import kernel_flops, matmul_flops
from flowrl_jax.planning.programs import Program, planned_learner, programs
from flowrl_jax.train_step import Learner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
        reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
    ),
]

PROMPT, RESPONSE, VOCAB, TENSOR = 384, 896, 4608, 2
BLOCK = VOCAB // TENSOR // 3  # of the vocabulary: three hold the logits of a third of the tokens
COLUMNS = PROMPT + RESPONSE


@dataclasses.dataclass(frozen=True, repr=False)  # pytest would print thousands of instructions
class Made:
    """A program with what the compiler made of it."""

    program: Program
    learner: Learner
    compiled: Compiled

    @property
    def executed(self) -> tuple[Executed, ...]:
        return self.compiled.executed


def small_config() -> Config:
    """Two layers over four devices, cut over fsdp and tensor; two micro-batches."""
    config = test_tiny.get_config()
    config.model.update(
        vocab_size=VOCAB, num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=128,
        mlp_dim=640, dtype="bfloat16", remat="full", tie_embeddings=False,
    )  # fmt: skip
    config.rollout.update(
        prompts_per_step=4, group_size=2, max_prompt_length=PROMPT, max_response_length=RESPONSE
    )
    config.train.update(updates_per_rollout=1, micro_batch_size=4, logprob_chunk=300)
    config.mesh.update(data=1, fsdp=2, tensor=TENSOR)
    return parse_config(config)


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    config = small_config()
    learner = planned_learner(config, describe("v5p:2x2x1").devices)
    return {
        program.name: Made(program, learner, compile_program(program.lower()))
        for program in programs(config, learner)
    }


def test_nobody_holds_all_pairs_of_tokens(made):
    for one in made.values():
        assert not with_axes(held(one.executed), (COLUMNS, COLUMNS))
        assert not with_axes(held(one.executed), (RESPONSE, COLUMNS))
        assert not with_axes(held(one.executed), (PROMPT, PROMPT))


def test_nobody_holds_the_logits_of_a_response(made):
    for one in made.values():
        for vocabulary in (VOCAB, VOCAB // TENSOR):
            for tokens in (COLUMNS, RESPONSE):
                assert not with_axes(held(one.executed), (tokens, vocabulary))
    blocks = with_axes(held(made["train_step"].executed), (RESPONSE, BLOCK))
    assert blocks, "the sizes are not recognisable any more: nobody holds a block's logits either"


@pytest.mark.parametrize("name", ["score", "train_step"])
def test_the_unembedding_is_not_gathered_block_by_block(made, name):
    def has_vocabulary(e: Executed) -> bool:
        return any(
            size in shape.dims
            for shape in e.instruction.shapes
            for size in (VOCAB, VOCAB // TENSOR, BLOCK)
        )

    executed = made[name].executed
    products = [e for e in executed if e.instruction.opcode in ("dot", "convolution")]
    block_loops = {e.loops[-1] for e in products if has_vocabulary(e) and e.loops}
    assert block_loops
    gathers = [e for e in executed if kind_of(e) == "all-gather" and has_vocabulary(e)]
    assert gathers, "the sizes are not recognisable any more: it is gathered nowhere"
    assert not [e.instruction.name for e in gathers if set(e.loops) & block_loops]


def test_the_cache_stays_where_it_is_while_decoding(made):
    one = made["decode"]
    exchanged = [e for e in one.executed if kind_of(e)]
    assert not [e for e in exchanged if with_axes(e.instruction.shapes, (COLUMNS,))]
    assert with_axes(held(one.executed), (COLUMNS,)), "the cache is not recognisable any more"


@pytest.mark.parametrize("name", ["decode", "train_step"])
def test_what_is_donated_is_reused_to_the_byte(made, name):
    one = made[name]
    alias = one.compiled.executable.memory_analysis().alias_size_in_bytes
    assert alias == padded_bytes(one.program, one.compiled.executable) > 0


def test_operations_are_those_of_the_model_and_of_rematerialisation(made):
    """Counted by hand for the train step, layer by layer."""
    one = made["train_step"]
    width, mlp, head = 256, 640, 128
    tokens = 8 * COLUMNS / (2 * TENSOR)  # by rows and by heads or mlp, on a device
    attention = width * (4 + 2 + 2) * head + 4 * head * width
    layer = 2 * tokens * (4 * attention + 4 * 3 * width * mlp)  # forward, again, and twice backward
    layer -= 2 * tokens * mlp * width  # what comes after the last product is not repeated
    logits = 4 * 2 * 8 * RESPONSE / (2 * TENSOR) * width * VOCAB
    assert matmul_flops(one.executed) == pytest.approx(2 * layer + logits, rel=0.02)
    blocks = 256 * 256 * 15  # 1280 tokens are five blocks, a causal mask leaves 15 of 25
    kernels = 2 * (8 / 2) * (4 / TENSOR) * blocks * 2 * head * (2 + 2 + 3 + 4)
    assert kernel_flops(one.executed) == (pytest.approx(kernels), ())


def test_the_formula_of_memory_is_near_the_compiler(made):
    """Arguments exactly but for padding; the sum within what the formula claims."""
    for name in ("decode", "train_step"):
        one = made[name]
        memory = one.compiled.executable.memory_analysis()
        arguments, _ = estimated_bytes(one.program, one.learner)
        assert arguments == pytest.approx(memory.argument_size_in_bytes, rel=0.02)
