"""Training changes a family in place and always restores it; tensors made in inference mode can be trained."""

import json

import pytest
import torch

from echodistill_core.errors import InputError
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.settings import EchoSettings
from echodistill_core.tensorfile import read_tensors
from echodistill_core.training import build, session
from echodistill_core.training.events import LossesLogged, StepDone
from echodistill_core.training.memory import OutOfMemoryError
from echodistill_core.training.run import open_run

SOURCES = ModelSources(family="tiny")


@pytest.mark.parametrize("trainable", ["kv+token", "lora", "full+token"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_restores_the_family_bit_for_bit(
    tmp_path, tiny_family, train_tiny, snapshot, changed, trainable, precision
):
    family = tiny_family()
    before = snapshot(family)
    train_tiny(tmp_path / "run", family, trainable=trainable, precision=precision, memory_mode="low")
    assert changed(before, snapshot(family)) == set()
    assert family.text.placeholders == {}
    assert not family.student.unet.is_gradient_checkpointing
    assert not any(p.requires_grad for network in family.networks().values() for p in network.parameters())


def test_two_runs_on_one_family_equal_two_runs_on_two(tmp_path, tiny_family, train_tiny):
    """A bf16 run casts the family; a second one must not learn from the rounded weights."""
    family = tiny_family()
    for name in ("first", "second"):
        train_tiny(tmp_path / name, family, precision="bf16")
    train_tiny(tmp_path / "alone", tiny_family(), precision="bf16")
    files = {n: (tmp_path / n / "distil/student.safetensors").read_bytes() for n in ("first", "second", "alone")}
    assert files["first"] == files["second"] == files["alone"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_fails_restores_the_family(tmp_path, tiny_family, train_tiny, snapshot, changed, step):
    family = tiny_family()
    before = snapshot(family)

    def fail(event):
        if isinstance(event, StepDone) and event.step == step:
            raise RuntimeError("broken listener")

    with pytest.raises(RuntimeError, match="broken listener"):
        train_tiny(tmp_path / "run", family, listen=fail, trainable="lora+token", iterations=3)
    assert changed(before, snapshot(family)) == set()
    assert family.text.placeholders == {}


def test_a_state_that_cannot_be_made_leaves_the_family_unchanged(
    tmp_path, tiny_family, train_tiny, snapshot, changed, monkeypatch
):
    family = tiny_family()
    before = snapshot(family)

    def fail(_):
        raise MemoryError("not enough memory for optimisers")

    monkeypatch.setattr(build, "new_optimizers", fail)
    with pytest.raises(OutOfMemoryError, match="memory for optimisers"):
        train_tiny(tmp_path / "run", family, trainable="lora")
    assert changed(before, snapshot(family)) == set()


@pytest.mark.parametrize("loaded_inside", [False, True])
def test_tensors_from_inference_mode_can_be_trained(tmp_path, train_tiny, loaded_inside):
    """ComfyUI's loaders make their tensors in inference mode, and it runs nodes in it."""

    def load(parts):
        return load_family(
            parts["student"],
            parts["teacher"],
            name="tiny",
            teacher_prediction="v_prediction",
            architecture=TINY,
            licences=dict.fromkeys(("teacher", "student"), "MIT (random weights)"),
        )

    with torch.inference_mode():
        parts = {role: tiny_checkpoint(role) for role in ("student", "teacher")}
        assert parts["student"]["unet"]["conv_in.weight"].is_inference()
        if loaded_inside:
            train_tiny(tmp_path / "run", load(parts))
    if not loaded_inside:
        train_tiny(tmp_path / "run", load(parts))
    train_tiny(tmp_path / "ordinary")
    a, b = ((tmp_path / n / "distil/student.safetensors").read_bytes() for n in ("run", "ordinary"))
    assert a == b


def test_training_under_no_grad_learns(tmp_path, train_tiny):
    with torch.no_grad():
        train_tiny(tmp_path / "run")
    deltas = read_tensors(tmp_path / "run/distil/student.safetensors")
    assert all(t.abs().max() > 0 for n, t in deltas.items() if n.endswith(".diff"))


@pytest.mark.parametrize(
    "weights",
    [
        {"teacher_weight": 0.0, "alignment_weight": 0.0, "adversarial_weight": 0.0},
        {
            "teacher_weight": 0.0,
            "identity_weight": 0.0,
            "mse_weight": 0.0,
            "swd_weight": 0.0,
            "adversarial_weight": 0.0,
        },
    ],
)
def test_settings_from_which_nothing_learns_are_refused_before_a_folder_is_made(tmp_path, train_tiny, weights):
    with pytest.raises(InputError, match="nothing would learn"):
        train_tiny(tmp_path / "run", **weights)
    assert not (tmp_path / "run").exists()


def test_a_device_that_computes_nothing_is_refused_before_a_folder_is_made(tmp_path, train_tiny):
    with pytest.raises(InputError, match="device 'meta' cannot be used"):
        train_tiny(tmp_path / "run", device="meta")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_needs_no_backbones(tmp_path, train_tiny, monkeypatch):
    run = train_tiny(tmp_path / "run")

    def missing(*_):
        raise InputError("backbones are missing")

    monkeypatch.setattr(session, "load_backbones", missing)
    assert train_tiny(tmp_path / "run").record == run.record


def test_a_lost_adapter_is_written_again(tmp_path, train_tiny):
    run = train_tiny(tmp_path / "run")
    path = run.path("distil", "student.safetensors")
    before = path.read_bytes()
    path.unlink()
    assert not run.is_finished("distil")
    steps = []
    train_tiny(tmp_path / "run", listen=lambda e: steps.append(e) if isinstance(e, StepDone) else None)
    assert path.read_bytes() == before
    assert steps == []


def test_cancel_at_any_event_leaves_a_checkpoint(tmp_path, tiny_family, train_tiny):
    """A cancel while the log is written, just before a checkpoint, must not lose the computed iterations."""

    def cancel(event):
        if isinstance(event, LossesLogged):
            raise KeyboardInterrupt

    overrides = {"iterations": 3, "log_every": 100, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", listen=cancel, **overrides)
    assert (tmp_path / "run/distil/checkpoint.safetensors").is_file()
    train_tiny(tmp_path / "run", **overrides)
    train_tiny(tmp_path / "whole", **overrides)
    a, b = ((tmp_path / n / "distil/student.safetensors").read_bytes() for n in ("run", "whole"))
    assert a == b


def test_a_pool_that_was_changed_is_refused(tmp_path, tiny_family, train_tiny):
    run = train_tiny(tmp_path / "run")
    settings = EchoSettings(iterations=2, pool_size=2)

    def cancel(event):
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.echo(run, tiny_family(), settings, cancel)
    (run.path("echo", "pool", "000.png")).write_bytes(run.path("echo", "pool", "001.png").read_bytes())
    with pytest.raises(InputError, match="was changed since it was made"):
        session.echo(run, tiny_family(), settings, lambda _: None)


def test_a_run_json_without_its_parts_is_an_input_error(tmp_path, train_tiny):
    run = train_tiny(tmp_path / "run")
    path = run.folder / "run.json"
    path.write_text(json.dumps({k: v for k, v in run.record.items() if k != "settings"}))
    with pytest.raises(InputError, match="lacks settings"):
        open_run(run.folder)


def test_sampling_with_the_student_needs_no_teacher_in_the_cache(monkeypatch, tmp_path):
    """SD-Turbo and an adapter suffice for sampling; SD 2.1 is only needed for training."""
    asked = []

    def cached(name, cache_dir=None):
        asked.append(name)

    monkeypatch.setattr("echodistill_core.models.open.cached_folder", cached)
    with pytest.raises(InputError, match="stabilityai/sd-turbo"):
        open_family(ModelSources(family="sd-turbo"), with_teacher=False)
    with pytest.raises(InputError, match="is not in the hub cache"):
        open_family(ModelSources(family="sd-turbo"), with_teacher=True)
    assert "sd2.1" in asked
