"""Several processes as one run: what --distributed accepts, and when it joins anybody."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh

from flowrl_jax import distributed
from flowrl_jax.distributed import RowShare, row_share
from flowrl_jax.errors import InputError
from flowrl_jax.sharding import Layout


def parsed(*words: str) -> flags.FlagValues:
    """The flags of a command line."""
    values = flags.FlagValues()
    distributed.define_flags(values)
    values(["command", *words])
    return values


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict[str, Any]]]:
    """What jax.distributed was asked for; it joins nobody, and jax's settings stay."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(distributed, "_configure", lambda: None)
    monkeypatch.setattr(distributed, "_speak_up", lambda: None)
    for name in (
        "SLURM_NTASKS",
        "SLURM_STEP_NODELIST",
        "FLOWRL_DISTRIBUTED",
        "FLOWRL_JOIN_SECONDS",
    ):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_machine_of_its_own_joins_nobody(joined: list) -> None:
    distributed.join(parsed())
    distributed.join(parsed("--distributed=none"))
    assert joined == []


def test_processes_given_by_hand(joined: list, capsys: pytest.CaptureFixture) -> None:
    distributed.join(parsed("--distributed=10.0.0.2:8476,4,3", "--heartbeat_seconds=7"))
    assert capsys.readouterr().err.count("\n") == 1
    ((address, settings),) = joined
    assert address == ("10.0.0.2:8476", 4, 3)
    assert settings["heartbeat_timeout_seconds"] == 7


def test_a_dead_process_is_noticed_within_a_minute(joined: list) -> None:
    distributed.join(parsed("--distributed=h:1,2,0"))
    assert 2 * joined[0][1]["heartbeat_timeout_seconds"] <= 60
    assert joined[0][1]["initialization_timeout"] < 60


def test_what_slurm_says_is_taken(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.join(parsed())  # an allocation's shell is no step of the job
    assert joined == []
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    distributed.join(parsed())
    assert joined[0][0] == (None, None, None)


def test_the_environment_may_choose(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWRL_DISTRIBUTED", "h:1,2,1")
    distributed.join(parsed())
    assert joined[0][0] == ("h:1", 2, 1)


@pytest.mark.parametrize(
    "word",
    [
        *("--distributed=four", "--distributed=h:1,2", "--distributed=h,2,0"),
        *("--distributed=h:1,2,2", "--distributed=h:1,0,0", "--heartbeat_seconds=0"),
        "--join_seconds=0",
    ],
)
def test_mistakes(joined: list, word: str) -> None:
    with pytest.raises(InputError, match=word.partition("=")[0]):
        distributed.join(parsed(word))
    assert joined == []


def test_others_that_do_not_come_are_a_fault_worth_another_try(
    joined: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialize(*_: Any, **__: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED:\n  2/4 tasks")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match=r"did not meet \(DEADLINE_EXCEEDED: 2/4 tasks\)") as found:
        distributed.join(parsed("--distributed=h:1,4,0"))
    assert isinstance(found.value.code, str)  # printed, and exit code 1: supervisors try again


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as says who holds it."""

    id: int
    process_index: int


def layout(processes: int, devices: int, batch: int) -> Layout:
    """Over a number of devices of each process, with the batch in some parts."""
    found = [Device(i, i // devices) for i in range(processes * devices)]
    axes = np.array(found).reshape(batch, 1, -1)
    return Layout(Mesh(axes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))


@pytest.mark.parametrize(
    ("devices", "batch", "leaders", "leads"),
    [
        (4, 8, (0, 1), (True, True)),  # four parts of the batch each
        (4, 2, (0, 1), (True, True)),  # one each
        (4, 1, (0,), (True, False)),  # heads are cut over both
        (1, 1, (0,), (True, False)),
    ],
)
def test_rows_that_a_process_holds(
    monkeypatch: pytest.MonkeyPatch, devices: int, batch: int, leaders: tuple, leads: tuple
) -> None:
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        share = row_share(layout(2, devices, batch))
        assert (share.leaders, share.leads) == (leaders, leads[process])
        each = 16 // len(leaders)
        start = process * each if len(leaders) > 1 else 0
        assert share.part(16) == slice(start, start + each)


def test_rows_that_straddle_processes_are_refused() -> None:
    with pytest.raises(InputError, match="3 devices for the same rows, .* the 2 devices of a proc"):
        row_share(layout(3, 2, 2))


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 do not divide over 2"):
        RowShare(0, (0, 1)).part(3)


def test_totals_are_over_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that hold the same rows do not count twice."""
    monkeypatch.setattr(distributed, "_gather", lambda _: [[1, 2.5], None, [3, 4.5], None])
    assert RowShare(0, (0, 2)).total([1, 2.5]) == [4, 7.0]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: sync", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 10 bytes", False),
    ],
)
def test_which_errors_another_process_causes(text: str, lost: bool) -> None:
    assert distributed._is_loss(jax.errors.JaxRuntimeError(text)) is lost


def test_faults_of_a_process_alone_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="Gloo"):
        distributed.leave_failed(RuntimeError("Gloo failed"))
    assert distributed.leave(75) == 75


def test_one_process_asks_only_itself() -> None:
    assert distributed.any_process(True) is True
    assert distributed.any_process(False) is False
