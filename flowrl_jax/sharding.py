"""Where arrays live: a mesh, and one table from the model's axes to the mesh's.

The model names its axes (`embed`, `heads`, ...); a layout says which mesh axes each of them is
cut over. Meshes have the axes `data`, `fsdp`, `context` and `tensor`; on one device all of them are
1. Several TPU slices are told apart by `data`: what crosses between them is the gradient of each
micro-batch, in the compute dtype.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowrl_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Parameters are cut over fsdp along the embedding and over tensor along heads, mlp or vocabulary;
# activations are cut over data and fsdp along the batch.
# Where rows are cut over context as well, `make_layout` changes what `CONTEXT_RULES` names.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("seq", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("activation_embed", None),
    ("norm", None),
    ("lora", None),
)
CONTEXT_RULES = {"seq": "context", "embed": ("fsdp", "context")}

# By platform. On TPUs a matrix product must not be cut into a loop of its own with the transfer of
# its operand: by the compiler's own estimate that is slower, and it takes memory.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, for one of them, takes all that are left.

    Attributes:
        data: copies of the parameters, each seeing its own rows.
        fsdp: shards of the parameters and the optimiser's state, each seeing its own rows.
        tensor: shards of heads, mlp and vocabulary.
        context: shards of rows along their tokens, for rows that are too long for one device;
            shards of the parameters as well.
        optimizer_over_data: whether the optimiser's state is cut over `data` too, instead of one
            whole copy for each of the parameters'.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    optimizer_over_data: bool = False


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the mesh's axes, in the order of `MESH_AXES`, over a number of devices.

    Raises:
        InputError: if the sizes do not multiply to the number of devices.
    """
    shape = [getattr(config, axis) for axis in MESH_AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise InputError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))}: sizes must be positive, at most one"
            " of them -1"
        )
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if int(np.prod(shape)) != count:
        raise InputError(
            f"mesh {' x '.join(MESH_AXES)} = {' x '.join(map(str, shape))} does not fit"
            f" {count} devices: choose sizes whose product is {count}"
        )
    return tuple(shape)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices as `config` says, slice by slice and host by host.

    The devices of a host are neighbours along the last axes, so that the rows a host holds are
    adjacent. Several slices of TPUs lie along `data`, whose traffic their slower network can bear.

    Args:
        config: sizes of the axes.
        devices: all devices by default.

    Raises:
        InputError: if the sizes do not multiply to the number of devices, or the slices cannot lie
            along `data`.
    """
    if devices is None:
        # Each process then holds rows that follow one another.
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    shape = mesh_shape(config, len(devices))
    slices = {_slice(device) for device in devices}
    if shape[0] % len(slices):
        raise InputError(
            f"mesh.data={shape[0]} is not a multiple of the {len(slices)} slices, which hold copies"
            f" of the policy each: set mesh.data={len(slices)}, or another multiple"
        )
    if len(slices) > 1:
        devices = sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))
    return _mesh(devices, shape)


def _slice(device: Any) -> int:
    """Which of several TPU slices, joined by their hosts' network, a device is in."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _mesh(devices: Any, shape: tuple[int, ...]) -> Mesh:
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=kinds)


def _axes(rule: Any) -> tuple[str, ...]:
    """The mesh axes that a rule names."""
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which named axes are cut over it.

    Attributes:
        mesh: the devices.
        rules: pairs of a model axis and a mesh axis, several mesh axes or None.
        optimizer_over_data: see `MeshConfig`.
    """

    mesh: Mesh
    rules: tuple[tuple[str, Any], ...] = RULES
    optimizer_over_data: bool = False

    @property
    def batch_shards(self) -> int:
        """Number of parts that the rows of a batch are cut into."""
        return self.shards("batch")

    def check_columns(self, columns: int) -> None:
        """Refuses rows that do not divide.

        Args:
            columns: tokens of a row, padding among them.

        Raises:
            InputError: with the size, the rule and the remedy.
        """
        if columns % self.context_shards:
            raise InputError(
                f"rows of {columns} tokens (rollout.max_prompt_length + max_response_length) do not"
                f" divide over mesh.context={self.context_shards}: choose a multiple of it"
            )

    def jit(self, function: Callable, **settings: Any) -> Any:
        """`jax.jit` of a function that is traced with this layout active.

        Args:
            function: to compile.
            settings: further arguments of `jax.jit`.
        """

        @functools.wraps(function)
        def within(*arguments):
            with self.activate():
                return function(*arguments)

        return jax.jit(within, compiler_options=self.compiler_options, **settings)

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What programs for these devices are compiled with, if anything."""
        return COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform)

    @property
    def context_shards(self) -> int:
        """Number of parts that a row is cut into along its tokens."""
        return self.shards("seq")

    def shards(self, axis: str) -> int:
        """Number of parts that an axis of the model is cut into."""
        return math.prod(self.mesh.shape[name] for name in _axes(dict(self.rules)[axis]))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array whose axes have these names."""
        spec: Any = nn.logical_to_mesh_axes(axes, self.rules)
        return NamedSharding(self.mesh, spec)

    @property
    def batch(self) -> NamedSharding:
        """The sharding of arrays whose first axis is the batch."""
        return self.sharding("batch")

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def tree_shardings(self, boxed: Any) -> Any:
        """Shardings of a parameter tree whose leaves are boxed with their axis names.

        Leaves without names (step counters, tables) are held whole by every device.
        """
        return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), self.mesh, self.rules)

    def optimizer_shardings(self, boxed: Any) -> Any:
        """Shardings of an optimiser's state whose leaves are boxed with their axis names."""
        rules = dict(self.rules)
        if self.optimizer_over_data:
            rules["embed"] = (*_axes(rules["embed"]), "data")
        return Layout(self.mesh, tuple(rules.items())).tree_shardings(boxed)

    @contextlib.contextmanager
    def activate(self):
        """Makes the model's activation constraints refer to this layout while tracing."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def put_batch(self, tree: Any) -> Any:
        """Places host arrays with the batch as first axis; each host passes its own rows."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.batch, np.asarray(x)), tree
        )


# jax's own context of a mesh cannot be entered while tracing.
_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def make_layout(mesh: Mesh, sizes: dict[str, int], *, optimizer_over_data: bool = False) -> Layout:
    """The layout of a model over a mesh.

    Args:
        mesh: from `make_mesh`.
        sizes: of the model's axes that may be cut, e.g. `{"mlp": 512}`.
        optimizer_over_data: see `MeshConfig`.

    Returns:
        The layout. Key and value heads that are fewer than the tensor axis are held whole by every
        shard of it, as grouped-query attention wants.

    Raises:
        InputError: if a size does not divide over its mesh axis.
    """
    rules = dict(RULES)
    if mesh.shape.get("context", 1) > 1:
        rules |= CONTEXT_RULES
    for axis, size in sizes.items():
        over = _axes(rules[axis])
        shards = math.prod(mesh.shape[name] for name in over)
        if size % shards == 0:
            continue
        if axis != "kv_heads":
            raise InputError(
                f"the model's {axis} axis of {size} does not divide over"
                f" {' x '.join(f'mesh.{name}' for name in over)}={shards}: choose a divisor of"
                f" {size}"
            )
        rules[axis] = None
    layout = Layout(mesh, tuple(rules.items()), optimizer_over_data)
    parts = layout.shards("embed") * mesh.shape["data"]
    if optimizer_over_data and sizes.get("embed", 0) % parts:
        raise InputError(
            f"mesh.optimizer_over_data: the model's width of {sizes['embed']} does not divide over"
            f" {parts} parts (data x the shards of parameters): set it to False"
        )
    return layout


def sampling_layout(layout: Layout, sizes: dict[str, int], tensor: int) -> Layout:
    """The layout of weights and cache while sampling: no weight is gathered at every token.

    Args:
        layout: of training.
        sizes: of the model's axes that may be cut, as in `make_layout`.
        tensor: parts that heads, mlp and vocabulary are cut into, whole copies of which share the
            rows; 0 keeps the layout of training or, where that cuts rows along their tokens, its
            `tensor`; -1 takes as many parts as divide these
            and the devices.

    Returns:
        A layout over the same devices in the same order.

    Raises:
        InputError: the devices or the model's axes do not divide.
    """
    devices = layout.mesh.devices.reshape(-1)
    if tensor == 0 and layout.context_shards == 1:
        return layout
    tensor = tensor or layout.mesh.shape["tensor"]
    if tensor == -1:
        cut = [size for axis, size in sizes.items() if dict(RULES)[axis] == "tensor"]
        tensor = math.gcd(devices.size, *cut)
    if devices.size % tensor:
        raise InputError(
            f"rollout.tensor={tensor} does not divide the {devices.size} devices: choose a divisor"
        )
    return make_layout(_mesh(devices, (devices.size // tensor, 1, 1, tensor)), sizes)


def local_rows(x: jax.Array) -> np.ndarray:
    """This host's rows of an array whose first axis is the batch, in order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def active_layout() -> Layout | None:
    """The layout that is active while tracing, if any."""
    return _ACTIVE.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for a sharding of an activation by the names of its axes; a no-op without a layout."""
    layout = _ACTIVE.get()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*axes))
