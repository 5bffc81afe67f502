"""Whole stages on the tiny family: they learn, report their progress, and give previews."""

from dataclasses import replace

import pytest
import torch
from run_files import StopError, stage_files, stop_at

from echodistill_core.adapter.apply import personalised
from echodistill_core.sampling import sample
from echodistill_core.training.events import CheckpointSaved, LossesLogged, PreviewReady, StepDone, latest
from echodistill_core.training.loop import adapters_of, preview
from echodistill_core.training.run import open_run
from echodistill_core.training.samples import one_step_images
from echodistill_core.training.steps import iterate, teacher_step

TEACHER_ONLY = {"alignment_weight": 0.0, "adversarial_weight": 0.0, "augment": False, "flip": False}


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trainable", "falls_below"), [("full+token", 0.5), ("kv+token", 0.97)])
def test_the_teachers_loss_falls_on_one_photograph(tiny_state, draw_batch, make_photographs, trainable, falls_below):
    settings = {**TEACHER_ONLY, "teacher_lr": 1e-3 if trainable.startswith("full") else 1e-2, "token_lr": 1e-2}
    state = tiny_state(trainable=trainable, batch_size=2, **settings)
    photographs = make_photographs(1)
    teacher, generator = state.family.teacher, torch.Generator().manual_seed(99)
    batch = draw_batch(state, 0, photographs)

    @torch.no_grad()
    def loss():
        # The same noise at sixteen timesteps, before and after.
        generator.manual_seed(99)
        z = state.family.encode(batch.pixels[:1]).expand(16, -1, -1, -1)
        noise, t = torch.randn(z.shape, generator=generator), torch.arange(30, 1000, 62)[:16]
        text = state.condition(["photo of a <new1> dog"], "teacher").expand(16)
        abar = teacher.schedule.alphas_cumprod[t].reshape(16, 1, 1, 1)
        v = teacher.unet(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, encoder_hidden_states=text.features).sample
        return (v - (abar.sqrt() * noise - (1 - abar).sqrt() * z)).square().mean().item()

    before = loss()
    for step in range(40):
        teacher_step(state, draw_batch(state, step, photographs))
    assert loss() < falls_below * before


def test_critics_learn_to_tell_photographs_from_a_frozen_students_images(tiny_state, draw_batch):
    state = tiny_state(
        alignment_weight=0.0, teacher_weight=0.0, student_lr=0.0, token_lr=0.0, critic_lr=1e-3, weight_decay=0.0
    )
    losses = [iterate(state, draw_batch(state, step)) for step in range(30)]
    for role in ("dino", "dinov2", "clip"):
        first, last = (sum(row[f"critic_{role}"].item() for row in part) / 5 for part in (losses[:5], losses[-5:]))
        assert last < 0.7 * first
        # Better critics raise the student's adversarial loss.
        assert losses[-1][f"adv_{role}"] > losses[0][f"adv_{role}"]


# --- events and logs ------------------------------------------------------------------------------


def test_a_run_sends_its_events_in_order(train_tiny, tmp_path):
    events = []
    run = train_tiny(
        tmp_path / "run", listen=events.append, iterations=5, log_every=2, checkpoint_every=3, preview_every=4
    )
    done = [e for e in events if isinstance(e, StepDone)]
    assert [(e.stage, e.step, e.iterations) for e in done] == [("distil", i, 5) for i in range(1, 6)]
    logged = [[row["step"] for row in e.rows] for e in events if isinstance(e, LossesLogged)]
    assert [step for rows in logged for step in rows] == [1, 2, 3, 4, 5]
    assert logged[0] == [1, 2]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [3, 5]
    previews = [e for e in events if isinstance(e, PreviewReady)]
    assert [e.step for e in previews] == [4, 5]
    assert all(e.images.shape == (4, 3, 64, 64) and e.images.abs().max() <= 1 for e in previews)
    rows = run.read_log("distil")
    for event, row in zip(done, rows, strict=True):
        assert row == {"step": event.step, **{n: v.item() for n, v in event.losses.items()}}
    finished = run.record["finished"]["distil"]
    assert (finished["iterations"], finished["losses"]) == (5, rows[-1])


def test_a_finished_run_records_the_last_value_of_every_term(train_tiny, tmp_path):
    """Also of terms that the last iteration does not compute: iterations 1 and 4 compute image losses."""
    run = train_tiny(tmp_path / "run", iterations=5, image_every=3, log_every=1)
    rows, losses = run.read_log("distil"), run.record["finished"]["distil"]["losses"]
    assert ["swd" in row for row in rows] == [True, False, False, True, False]
    assert losses == {**rows[3], **rows[4]}
    assert (losses["step"], losses["swd"]) == (5, rows[3]["swd"])
    assert latest(rows[:2]) == {**rows[0], **rows[1]}


def test_a_finished_run_is_found_finished(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "run")
    before, events = stage_files(run), []
    again = train_tiny(tmp_path / "run", listen=events.append)
    assert events == []
    assert stage_files(again) == before


def test_a_listener_that_raises_stops_the_run_after_a_checkpoint(tiny_family, train_tiny, snapshot, changed, tmp_path):
    family = tiny_family()
    before = snapshot(family)
    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", family, stop_at(StepDone, StopError, step=2), iterations=4)
    assert changed(before, snapshot(family)) == set()
    run = open_run(tmp_path / "run")
    assert not run.is_finished("distil")
    assert set(stage_files(run)) == {"checkpoint.safetensors"}
    assert [row["step"] for row in run.read_log("distil")] == [1, 2]
    whole = train_tiny(tmp_path / "whole", iterations=4)
    assert stage_files(train_tiny(tmp_path / "run", iterations=4)) == stage_files(whole)


def test_previews_are_samples_of_the_student_as_it_is(tiny_family, tiny_state, draw_batch):
    family = tiny_family()
    state = tiny_state(family, student_lr=1e-2)
    iterate(state, draw_batch(state))
    seen, adapter = preview(state), adapters_of(state, "distil", 1)["student"]
    many = one_step_images(state, ["a <new1> dog", "photo"], 3, 64)
    state.family.restore()
    plain = replace(family, text=tiny_family().text)
    with personalised(plain, [adapter]) as model:
        expected = sample(model, ["photo of a <new1> dog"] * 4, seed=state.settings.seed)
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
        expected = sample(model, ["a <new1> dog", "photo"], seed=3)
        torch.testing.assert_close(many, expected, rtol=0, atol=1e-4)
    with personalised(plain) as model:
        assert (sample(model, ["photo of a dog"]) - seen[:1]).abs().max().item() > 1e-2
