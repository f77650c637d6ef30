"""Meshes of 8 virtual devices: where arrays live, and that no result depends on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.models.attention import Columns, attend
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.optimizer import OptimizerConfig, make_optimizer
from flowrl_jax.sharding import Layout, MeshConfig, make_layout, make_mesh
from flowrl_jax.train_step import init_state, make_score, make_train_step
from tests.tiny import MESH_CONFIG, make_learner, make_state, tiny_params, train_batch

BATCH = train_batch(MESH_CONFIG, 16, 2)
OBJECTIVE = FlowRLConfig(beta=2.0, log_z=LogZConfig(dropout=0.3))
KEY = jax.random.key(5)

# (data, fsdp, tensor, context)
MESHES = [
    (1, 2, 4),
    (1, 2, 2, 2),
    pytest.param((2, 1, 1, 4), marks=pytest.mark.slow),
    pytest.param((1, 8, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), marks=pytest.mark.slow),
    pytest.param((2, 2, 2), marks=pytest.mark.slow),
]


def name(shape):
    return "x".join(map(str, shape))


def gradient(mesh, micro_batch_size=0, config=MESH_CONFIG):
    """Gradient and metrics of one step over a mesh, on the host."""
    learner = make_learner(config, OBJECTIVE, mesh=mesh, micro_batch_size=micro_batch_size)
    layout = make_layout(learner.layout.mesh, {"kv_heads": config.num_kv_heads})
    learner = dataclasses.replace(learner, layout=layout)
    batch = learner.layout.put_batch(BATCH)
    state, metrics = make_train_step(learner, 8)(make_state(learner), batch, KEY)
    return jax.device_get((state.opt_state, metrics))


@pytest.fixture(scope="module")
def alone():
    return gradient((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_loss_and_gradient_do_not_depend_on_the_mesh(mesh, alone):
    """In micro-batches as well, added in place: each takes rows of every shard."""
    config = dataclasses.replace(MESH_CONFIG, remat="full")
    assert_same(gradient(mesh, micro_batch_size=8, config=config), alone)


@pytest.mark.slow
def test_groups_of_heads_fewer_than_their_shards():
    """Two key heads on four shards of the query heads: every shard holds them whole."""
    config = dataclasses.replace(MESH_CONFIG, num_kv_heads=2)
    assert_same(gradient((1, 2, 4), config=config), gradient((1, 1, 1), config=config))


def assert_same(ours, other):
    (grads, metrics), (expected_grads, expected_metrics) = ours, other
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    paths = jax.tree_util.tree_leaves_with_path(expected_grads)
    for (path, expected), found in zip(paths, jax.tree.leaves(grads), strict=True):
        # To 1e-5 of the parameter's largest gradient: float32 sums in another order.
        np.testing.assert_allclose(
            found,
            expected,
            atol=1e-5 * np.abs(expected).max() + 1e-8,
            err_msg=jax.tree_util.keystr(path),
        )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_over_devices(kernel, kv_heads):
    """Heads over two devices or held whole, rows over two, their tokens over two."""
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(0, 1, (4, heads, 22, 6)).astype(np.float32)  # noqa: E731
    query, key, value = draw(8), draw(kv_heads), draw(kv_heads)
    real = (np.arange(22) >= 3) & (np.arange(22) < [[18], [22], [9], [5]])

    def run(query, key, value):
        columns = Columns(jnp.asarray(real))
        out = attend(query, key, value, columns, scale=0.4, window=9, implementation=kernel)
        return jnp.where(real[:, None, :, None], out, 0.0)

    def with_grads(*arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(jnp.cos(out))

    expected = jax.jit(with_grads)(query, key, value)
    layout = make_layout(make_mesh(MeshConfig(1, 2, 2, 2)), {"kv_heads": 2 if kv_heads == 4 else 1})

    def sharded(*arrays):
        with layout.activate():
            return with_grads(*arrays)

    found = jax.jit(sharded)(query, key, value)
    # Float32 sums of 9 terms of size 1, in blocks of other sizes.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[:2], ids=name)
def test_logprobs_do_not_depend_on_the_mesh(mesh):
    arrays = BATCH.tokens, BATCH.prompt_mask, BATCH.response_mask
    scores = []
    for shape in ((1, 1, 1), mesh):
        learner = make_learner(MESH_CONFIG, OBJECTIVE, mesh=shape)
        layout = make_layout(learner.layout.mesh, {})
        learner = dataclasses.replace(learner, layout=layout)
        params = make_state(learner).params["policy"]
        scores.append(make_score(learner)(params, *learner.layout.put_batch(arrays)))
    np.testing.assert_allclose(*map(np.asarray, scores), rtol=1e-5, atol=1e-5)


class Chip:
    """What a mesh needs to know of a device of several slices."""

    platform = "tpu"

    def __init__(self, id, slice_index, process_index):
        self.id, self.slice_index, self.process_index = id, slice_index, process_index


def test_slices_lie_along_data():
    """Whatever order the processes of the slices came in."""
    chips = [Chip(i, i % 2, i // 2) for i in range(8)]
    with pytest.raises(InputError, match=r"mesh\.data=1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(1, 8, 1), chips)
    mesh = make_mesh(MeshConfig(2, 2, 2), chips)
    assert [[c.slice_index for c in part.flat] for part in mesh.devices] == [[0] * 4, [1] * 4]


def test_rows_must_divide_over_context():
    layout = make_layout(make_mesh(MeshConfig(1, 2, 1, 4)), MESH_CONFIG.axis_sizes)
    assert layout.context_shards == 4 and layout.shards("embed") == 8
    layout.check_columns(12)
    with pytest.raises(InputError, match=r"rows of 13 tokens .* mesh\.context=4"):
        layout.check_columns(13)


@pytest.mark.slow
def test_a_state_is_made_in_pieces():
    """Policy and Adam's moments are cut over fsdp and tensor; every mesh has the same numbers."""
    optimizer = make_optimizer(OptimizerConfig(), 10, 1, train_log_z=True)
    learner = make_learner(MESH_CONFIG, OBJECTIVE, mesh=(1, 2, 4), optimizer=optimizer)
    state = init_state(learner, 8, jax.random.key(0))
    kernel = state.params["policy"]["layers"]["mlp"]["up"]
    assert kernel.shape == (2, 16, 24)
    assert kernel.addressable_shards[0].data.shape == (2, 8, 6)
    embedding = state.params["policy"]["embedding"]["tokens"]
    assert embedding.addressable_shards[0].data.shape == (32 // 4, 16 // 2)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2 and all(m.sharding == kernel.sharding for m in moments)
    single = init_state(
        make_learner(MESH_CONFIG, OBJECTIVE, optimizer=optimizer), 8, jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(single))
    # Parameters that are given are placed likewise.
    given = init_state(learner, 8, jax.random.key(0), policy=tiny_params(MESH_CONFIG))
    assert given.params["policy"]["layers"]["mlp"]["up"].sharding == kernel.sharding


@pytest.mark.slow
def test_an_optimizers_state_may_be_cut_over_data():
    """Each copy of the parameters holds half of the moments, and the step is the same."""
    results = []
    for over_data in (False, True):
        optimizer = make_optimizer(OptimizerConfig(), 10, 1, train_log_z=True)
        learner = make_learner(MESH_CONFIG, OBJECTIVE, mesh=(2, 2, 2), optimizer=optimizer)
        layout = make_layout(
            learner.layout.mesh, MESH_CONFIG.axis_sizes, optimizer_over_data=over_data
        )
        learner = dataclasses.replace(learner, layout=layout)
        state = make_state(learner)
        state, _ = make_train_step(learner, 8)(state, layout.put_batch(BATCH), KEY)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (2, 16, 24)]
        assert {x.addressable_shards[0].data.shape for x in moments} == {
            (2, 4 if over_data else 8, 12)
        }
        results.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), *results)
    with pytest.raises(InputError, match="width of 18 does not divide over 4 parts"):
        make_layout(learner.layout.mesh, {"embed": 18}, optimizer_over_data=True)


def test_mesh_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert Layout(mesh).batch_shards == 4
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == dict.fromkeys(
        ("data", "fsdp", "context", "tensor"), 1
    )


@pytest.mark.parametrize(
    "sizes", [(3, -1, 1), (1, 4, 1), (-1, -1, 1), (0, 8, 1), (-2, 4, 1), (1, 16, 1)]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(InputError, match=r"mesh") as caught:
        make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(caught.value)


def test_layout_of_sizes_that_do_not_divide():
    """Few key and value heads are held whole by every shard; anything else is an error."""
    mesh = make_mesh(MeshConfig(1, 2, 4))
    layout = make_layout(mesh, {"heads": 8, "kv_heads": 2, "embed": 16, "mlp": 24, "vocab": 32})
    rules = dict(layout.rules)
    assert rules["kv_heads"] is None and rules["heads"] == "tensor" and rules["embed"] == "fsdp"
    with pytest.raises(InputError, match=r"vocab axis of 33 .*mesh\.tensor=4"):
        make_layout(mesh, {"vocab": 33})
