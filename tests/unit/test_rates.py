"""The course of the learning rates over a stage."""

import math

import pytest
import torch

from echodistill_core.settings import EchoSettings
from echodistill_core.training import session, steps
from echodistill_core.training.rates import decay


@pytest.mark.parametrize("iterations", [1, 7, 200])
def test_cosine_is_torchs_own_annealing(iterations):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for step in range(iterations):
        assert 0.3 * decay("cosine", step, iterations) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_constant_is_one_everywhere():
    assert [decay("constant", step, 9) for step in range(9)] == [1.0] * 9


@pytest.mark.parametrize("course", ["constant", "cosine"])
def test_each_stage_runs_the_whole_course_with_every_optimiser(train_tiny, tiny_family, tmp_path, monkeypatch, course):
    rates, step = [], steps.teacher_step

    def spy(state, batch):
        groups = {name: [g["lr"] for g in o.param_groups] for name, o in state.trainables.optimizers.items()}
        rates.append((state.stage, groups))
        return step(state, batch)

    monkeypatch.setattr(steps, "teacher_step", spy)
    full = {"teacher_lr": 1e-3, "student_lr": 2e-3, "token_lr": 3e-3, "critic_lr": 4e-3}
    run = train_tiny(tmp_path / "run", iterations=4, lr_decay=course, **full)
    session.echo(run, tiny_family(), EchoSettings(iterations=2, pool_size=2), lambda event: None)
    assert [stage for stage, _ in rates] == ["distil"] * 4 + ["echo"] * 2
    for (_, groups), angle in zip(rates, [0, 45, 90, 135, 0, 90], strict=True):
        share = (1 + math.cos(math.radians(angle))) / 2 if course == "cosine" else 1.0
        assert groups["teacher"] == pytest.approx([1e-3 * share, 3e-3 * share])
        assert groups["student"] == pytest.approx([2e-3 * share])
        assert groups["critics"] == pytest.approx([4e-3 * share])
