"""Planning with the TPU compiler, and what is refused before it is asked."""

import importlib.util
import json
import os

import pytest

from configs import math_7b, test_tiny
from flowrl_jax import plan as module
from flowrl_jax.config import parse_config
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.plan import NAMES, plan, table
from flowrl_jax.planning.chips import CHIPS
from flowrl_jax.planning.measure import lower_bound, model_flops
from flowrl_jax.planning.programs import Program
from flowrl_jax.planning.shapes import PUBLISHED, planned_shape

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: pip install libtpu, or TPU_LIBRARY_PATH=.../libtpu.so",
)


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
    program = Program("score", lambda: None, tokens=8, backward=False, trips=1)
    attention = 4 * 2 * 2 + 4 * 1 * 2 * 2 + 2 * 2 * 4  # query, key and value, out
    weights = attention + 3 * 4 * 6 + 4 * 10 + 3 * 4  # mlp, unembedding, norms
    pairs = 4 * (8 / 2) * 2 * 2
    assert model_flops(shape, program, 8) == 8 * (2 * weights + pairs)
    chip = CHIPS["v5p"]
    assert lower_bound(program, shape, chip, 2, 459e12, 0.0) == pytest.approx(0.5)
    assert lower_bound(program, shape, chip, 2, 0.0, 2.77e12) == pytest.approx(1.0)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p-128", "", "v5e"])
def test_unknown_topologies_name_known_ones(topology, capsys):
    config = "--config=configs/test_tiny.py"
    assert module.main([config, f"--topology={topology}"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and ("v5p:2x2x2" in message or "not installed" in message)


def test_unknown_programs_are_named(capsys):
    assert module.main(["--config=configs/test_tiny.py", "--topology=v6e:2x4", "--programs=x"]) == 2
    assert "--programs=x: not known" in capsys.readouterr().err


@compiler
@pytest.mark.slow
def test_every_program_compiles_for_chips_that_are_not_there(tmp_path):
    config = test_tiny.get_config()
    config.rollout.max_response_length = 120
    config.mesh.update(data=1, fsdp=4, tensor=1)
    found = plan(parse_config(config), "v5p:2x2x1")
    assert list(found["programs"]) == list(NAMES) and found["fits"]
    assert found["devices"] == 4 and found["model"]["attention"] == "splash"
    step = found["programs"]["train_step"]
    # The whole train state is donated and becomes the next one.
    assert step["alias_bytes"] > 0.9 * (step["argument_bytes"] - 1e5)
    assert found["programs"]["decode"]["alias_bytes"] > 0
    json.dumps(found)
    assert "train_step" in table(found)
