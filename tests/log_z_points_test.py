"""Points of log Z: what a line says of each prompt, and a file that survives a resumption."""

import json
from typing import Any

import numpy as np
import pytest

from flowrl_jax import report
from flowrl_jax.errors import InputError
from flowrl_jax.log_z_points import (
    FILE,
    LOG_Z_ROWS,
    MOST,
    prompt_points,
    read_points,
    student_95,
)
from flowrl_jax.metric_sinks import MetricsConfig
from flowrl_jax.metrics import MetricWriter

QUIET = MetricsConfig(tensorboard=False, table=False)
# Tables of Student's distribution, 0.975.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 7: 2.365, 15: 2.131, 31: 2.040, 1000: 1.962}


def rows(*of_prompts: tuple[int, list[float], float]) -> np.ndarray:
    """`[B, 3]` of (prompt, estimates, log Z)."""
    return np.array(
        [[prompt, x, log_z] for prompt, estimates, log_z in of_prompts for x in estimates],
        np.float32,
    )


def test_quantiles_are_those_of_the_tables():
    for degrees, value in STUDENT.items():
        assert student_95(degrees) == pytest.approx(value, rel=2e-3)


def test_a_point_is_the_mean_of_its_prompt_with_students_interval():
    shuffled = rows((9, [1.0, 2.0, 4.0, 5.0], 2.5), (4, [0.0, 1.0], -1.0))[[3, 0, 5, 2, 1, 4]]
    four, nine = prompt_points(shuffled)
    # Prompt 9: mean 3, deviation sqrt(10 / 3), three degrees of freedom.
    half = 3.182 * (10 / 3) ** 0.5 / 2
    assert nine == pytest.approx([9, 3.0, 3.0 - half, 3.0 + half, 2.5], abs=5e-3)
    assert four == pytest.approx([4, 0.5, 0.5 - 12.706 * 0.5, 0.5 + 12.706 * 0.5, -1.0], rel=1e-3)


def test_prompts_that_say_nothing_have_no_point():
    assert prompt_points(rows((1, [0.5], 0.0), (2, [0.5, np.inf], 0.0))) == []
    many = rows(*((prompt, [0.0, 1.0], 0.0) for prompt in range(MOST + 9)))
    assert [point[0] for point in prompt_points(many)] == list(range(MOST))


def write(folder, first: int, last: int, resume: int | None = None) -> None:
    with MetricWriter(folder, config=QUIET, resume_step=resume) as writer:
        for step in range(first, last + 1):
            found: Any = rows((step, [0.0, 2.0], 0.5))
            writer.write(step, {"rollout/reward_mean": 0.0}, {LOG_Z_ROWS: found})


def test_the_file_of_a_resumed_run_is_that_of_one_that_never_stopped(tmp_path):
    write(tmp_path / "whole", 1, 6)
    write(tmp_path / "run", 1, 5)
    write(tmp_path / "run", 4, 6, resume=3)
    assert (tmp_path / "run" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "run" / FILE).open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["points"][0][0] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_report_shows_the_last_points(tmp_path):
    write(tmp_path, 1, 3)
    expected = [(1.0, 1 - 12.706205, 1 + 12.706205, 0.5)]
    assert read_points(tmp_path) == [pytest.approx(point) for point in expected]
    data = report.load([tmp_path])
    assert data.runs[tmp_path.name].log_z_points == read_points(tmp_path)
    assert "per prompt, with 95 % intervals" in report.page(data)
    (again,) = report.from_dict(json.loads(json.dumps(report.to_dict(data)))).runs.values()
    assert again.log_z_points == data.runs[tmp_path.name].log_z_points


def test_no_file_no_points_and_a_damaged_one_is_named(tmp_path):
    assert read_points(tmp_path) == []
    (tmp_path / FILE).write_text('{"step": 1, "points": []}\nrubbish\n{"step": 2, "points": []}\n')
    with pytest.raises(InputError, match=f"{FILE} line 2"):
        read_points(tmp_path)


def test_the_report_names_alarms(tmp_path):
    flags = [(1, 0), (2, 1), (3, 1), (4, 0), (5, 1)]
    with MetricWriter(tmp_path, config=QUIET) as writer:
        for step, flag in flags:
            writer.write(step, {"rollout/reward_mean": 0.0, "alarm/entropy": flag})
            if step % 2:
                writer.write(step, {"alarm/diversity": int(step == 3)})
    data = report.load([tmp_path])
    found = data.runs[tmp_path.name].alarms
    assert found == [("entropy", 2, 3), ("diversity", 3, 3), ("entropy", 5, 5)]
    shown = "entropy from step 2 to 3, diversity at step 3, entropy at step 5"
    assert shown in report.page(data)
    (again,) = report.from_dict(json.loads(json.dumps(report.to_dict(data)))).runs.values()
    assert again.alarms == data.runs[tmp_path.name].alarms
