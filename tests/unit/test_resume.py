"""A run that was stopped, killed or refused a write goes on and ends bit for bit as one that was not.

Every comparison is of whole run folders, byte by byte: trained weights, AdamW's moments and step counts, learning rates
and generators (all in checkpoint.safetensors), adapters, logs, pool and run.json. Controls show that it can fail.
"""

import dataclasses
import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import resume_worker
import torch
from PIL import Image
from resume_worker import ECHO, SOURCES, complete, fresh_family, photographs, settings

import echodistill_core
from echodistill_core.concept.photographs import Photograph, load_photographs
from echodistill_core.errors import InputError, StorageError
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.models.text import TextEncoder
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import EchoSettings, TrainSettings, affecting_result
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors
from echodistill_core.training import resume, run, session, steps
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.build import needed_backbones, new_optimizers, new_state
from echodistill_core.training.checkpoint import load_checkpoint, save_checkpoint
from echodistill_core.training.events import CheckpointSaved, LossesLogged, PoolProgress, StepDone
from echodistill_core.training.steps import critic_step, student_step, teacher_step

CHECKPOINT = "distil/checkpoint.safetensors"
STEPS = settings().iterations
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL, fork and limits")


@pytest.fixture(scope="module", autouse=True)
def live():
    """One thread, since sums depend on how many there are; live.state is the last state that a session made."""
    live, make, threads = SimpleNamespace(state=None), session.new_state, torch.get_num_threads()

    def remember(*arguments):
        live.state = make(*arguments)
        return live.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "with_placeholders", resume_worker.with_placeholders)
        patch.setattr(session, "new_state", remember)
        torch.set_num_threads(1)
        resume_worker.opened_family()
        gc.freeze()  # a vocabulary and the modules of three libraries: collecting takes longer than an iteration
        yield live
        gc.unfreeze()
        torch.set_num_threads(threads)


def train(folder, listen=resume_worker.ignore, pictures=None, family=None, **overrides):
    """The distillation stage as a process that has just begun would run it."""
    # Nothing may hang on what other code draws from the global generators.
    torch.seed()
    return session.train(
        pictures or photographs(), family or fresh_family(), settings(**overrides), SOURCES, folder, listen
    )


def echo(folder, listen=resume_worker.ignore, how=ECHO, family=None):
    torch.seed()
    return session.echo(run.open_run(folder), family or fresh_family(), how, listen)


def tree(folder):
    """Every file's bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def difference(a, b):
    """Names of the files that differ or are on one side only."""
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


def drawn_next(state):
    """What each of the state's generators draws next."""
    return {name: torch.rand(64, generator=g.clone_state()).tolist() for name, g in state.random.generators.items()}


def stop_at(kind, **where):
    """A listener that stops at the event of this kind with these attributes, and has seen all before it."""

    def listen(event):
        if isinstance(event, kind) and all(getattr(event, n) == v for n, v in where.items()):
            raise KeyboardInterrupt

    return listen


@pytest.fixture(scope="module")
def reference(tmp_path_factory, live):
    """Both stages without interruption: their files, and the random numbers that would come next."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(folder)
    kept = SimpleNamespace(distil_folder=folder, distil=tree(folder), distil_numbers=drawn_next(live.state))
    kept.folder = shutil.copytree(folder, folder.with_name("echoed"))
    echo(kept.folder)
    kept.echo, kept.echo_numbers = tree(kept.folder), drawn_next(live.state)
    assert len(kept.echo) == 14
    assert all("checkpoint" not in n or len(read_header(kept.folder / n).tensors) == 166 for n in kept.echo)
    return kept


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, live):
    """The folder of a run that was stopped after its second iteration. Copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, stop_at(StepDone, step=2))
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


# Stopped


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_by_the_user_at_any_step_it_ends_the_same(tmp_path, reference, live, step):
    # Checkpoints so rare that the stop itself has to make one, and other previews and logs, which may not matter.
    rare = {"checkpoint_every": 1000, "log_every": 3, "preview_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at(StepDone, step=step), **rare)
    assert difference(tree(tmp_path), reference.distil)
    events = []
    train(tmp_path, events.append)
    assert [e.step for e in events if isinstance(e, StepDone)] == list(range(step + 1, STEPS + 1))
    assert difference(tree(tmp_path), reference.distil) == []
    assert drawn_next(live.state) == reference.distil_numbers


def test_stopped_at_every_step_it_ends_the_same(tmp_path, reference, live):
    for step in range(1, STEPS + 1):
        kind = (StepDone, LossesLogged, CheckpointSaved)[step % 3]
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at(kind), checkpoint_every=1)
        assert read_header(tmp_path / CHECKPOINT).metadata["step"] == str(step)
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []
    assert drawn_next(live.state) == reference.distil_numbers


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (PoolProgress, {"done": 1}),
        (PoolProgress, {"done": 2}),
        (StepDone, {"step": 1}),
        (StepDone, {"step": 2}),
        (StepDone, {"step": 3}),
        (CheckpointSaved, {"step": 2}),
    ],
)
def test_an_echo_stopped_at_any_step_ends_the_same(tmp_path, reference, live, kind, where):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        echo(tmp_path, stop_at(kind, **where))
    assert difference(tree(tmp_path), reference.echo)
    echo(tmp_path)
    assert difference(tree(tmp_path), reference.echo) == []
    assert drawn_next(live.state) == reference.echo_numbers


def test_iterations_that_a_stop_lost_are_logged_once(tmp_path, reference):
    # An exception out of the computation leaves no checkpoint: step 3 is logged, but the checkpoint is of step 2.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "critic_step", _failing_at(4, steps.critic_step))
        with pytest.raises(ZeroDivisionError):
            train(tmp_path)
    assert [row["step"] for row in run.open_run(tmp_path).read_log("distil")] == [1, 2, 3]
    assert read_header(tmp_path / CHECKPOINT).metadata["step"] == "2"
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def _failing_at(call, function):
    calls = iter(range(1, 100))

    def failing(*arguments):
        if next(calls) == call:
            raise ZeroDivisionError
        return function(*arguments)

    return failing


# Controls: the comparison can fail


def test_another_seed_ends_elsewhere(tmp_path, reference, live):
    train(tmp_path, seed=1)
    assert {CHECKPOINT, "distil/student.safetensors", "distil/teacher.safetensors", "distil/log.jsonl"} <= set(
        difference(tree(tmp_path), reference.distil)
    )
    numbers = drawn_next(live.state)
    assert all(numbers[name] != reference.distil_numbers[name] for name in ("data", "noise"))


FORGETTING = {
    "nothing": lambda state, fresh: None,
    # Which follow from the settings and the step, so that no checkpoint need be believed.
    "learning rates": lambda state, fresh: state.trainables.optimizers["critics"].param_groups[0].update(lr=2e-4),
    "data generator": lambda state, fresh: state.random.generators["data"].set_state(fresh["data"]),
    "noise generator": lambda state, fresh: state.random.generators["noise"].set_state(fresh["noise"]),
    "moments of teacher": lambda state, fresh: state.trainables.optimizers["teacher"].state.clear(),
    "moments of student": lambda state, fresh: state.trainables.optimizers["student"].state.clear(),
    "moments of critics": lambda state, fresh: state.trainables.optimizers["critics"].state.clear(),
    "step counts": lambda state, fresh: [
        m["step"].fill_(1) for m in state.trainables.optimizers["student"].state.values()
    ],
    "weight decay": lambda state, fresh: (
        state.trainables.optimizers["critics"].param_groups[0].update(weight_decay=0.5)
    ),
    "one row": lambda state, fresh: state.trainables.token_embeddings["teacher"].data[0, :1].add_(1e-3),
}


@pytest.mark.parametrize("what", FORGETTING)
def test_a_resume_that_forgets_anything_ends_elsewhere(folder, reference, monkeypatch, what):
    def forgetful(path, state, fingerprint):
        fresh = {name: g.get_state() for name, g in state.random.generators.items()}
        load_checkpoint(path, state, fingerprint)
        FORGETTING[what](state, fresh)

    monkeypatch.setattr(session, "load_checkpoint", forgetful)
    train(folder)
    differing = difference(tree(folder), reference.distil)
    if what in ("nothing", "learning rates"):
        assert differing == []
    else:
        assert {CHECKPOINT, "distil/log.jsonl"} <= set(differing)


# Checkpoints by themselves


def state_of(**overrides):
    chosen = settings(**overrides)
    family = fresh_family()
    family.text = family.text.with_placeholders({chosen.placeholder: chosen.vectors})
    return new_state(family, load_backbones(needed_backbones(chosen), "tiny"), chosen)


def advance(state, iterations):
    """Algorithm 1 without the loop."""
    images = session.square_images(photographs(), 64, settings().crop)
    source = TrainingImages(images, settings(), state.family.latent_factor)
    for _ in range(iterations):
        batch = source.draw(state.step, state.random.generators["data"])
        teacher_step(state, batch)
        _, made = student_step(state, batch)
        critic_step(state, batch, made)
        state.step += 1


WRONG = {"seed": 7, "teacher_lr": 1e-2, "student_lr": 3e-2, "token_lr": 5e-2, "critic_lr": 7e-2, "weight_decay": 0.5}


def test_a_checkpoint_restores_weights_moments_generators_and_learning_rates(tmp_path):
    first = state_of()
    advance(first, 2)
    save_checkpoint(tmp_path / "two", first, "f")
    advance(first, 2)
    save_checkpoint(tmp_path / "four", first, "f")

    second = state_of(**WRONG)
    lrs = {name: [g["lr"] for g in o.param_groups] for name, o in second.trainables.optimizers.items()}
    assert lrs == {"teacher": [1e-2, 5e-2], "student": [3e-2], "critics": [7e-2]}
    load_checkpoint(tmp_path / "two", second, "f")
    lrs = {name: [g["lr"] for g in o.param_groups] for name, o in second.trainables.optimizers.items()}
    assert lrs == {"teacher": [1e-5, 1e-5], "student": [2e-5], "critics": [1e-4]}
    assert second.step == 2
    save_checkpoint(tmp_path / "again", second, "f")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "two").read_bytes()
    advance(second, 2)
    save_checkpoint(tmp_path / "second", second, "f")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "four").read_bytes()
    assert drawn_next(second) == drawn_next(first)

    # The control: the same file, but each optimiser keeps the learning rates that it was made with.
    third = state_of(**WRONG)
    load_checkpoint(tmp_path / "two", third, "f")
    for name, optimizer in new_optimizers(third).items():
        for group, wrong in zip(third.trainables.optimizers[name].param_groups, optimizer.param_groups, strict=True):
            group["lr"] = wrong["lr"]
    advance(third, 1)
    expected, found = read_tensors(tmp_path / "four"), third.trainables.tensors()
    assert not any(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path):
    first = state_of()
    advance(first, 1)
    save_checkpoint(tmp_path / "one", first, "f")
    second = state_of(**WRONG)
    load_checkpoint(tmp_path / "one", second, "f")
    size = (tmp_path / "one").stat().st_size
    with (tmp_path / "one").open("r+b") as file:  # in place, under the mapping
        file.write(b"\xff" * size)
    save_checkpoint(tmp_path / "two", second, "f")
    save_checkpoint(tmp_path / "one", first, "f")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


# Damaged checkpoints


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def damages(data):
    """Damaged copies of a checkpoint: cut off, or with one bit of the header changed."""
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 7, 8, 100, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        yield data[:length]
    yield data + b"\0"
    # In the length, in what determines the continuation, and anywhere.
    text = data[:header]
    bits = {
        8 * text.index(word) + b
        for word in (b'step":"2', b"lr\\", b"exp_avg", b"data_offsets")
        for b in range(0, 80, 5)
    }
    for bit in sorted({*range(0, 64, 5), *bits, *random.Random(0).choices(range(64, 8 * header), k=60)}):
        yield flipped(data, bit)


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(stopped, tmp_path):
    state, path = state_of(), tmp_path / "checkpoint.safetensors"
    before = {name: t.clone() for name, t in state.trainables.tensors().items()}
    numbers, fingerprint = drawn_next(state), run.open_run(stopped).fingerprint("distil")
    data = (stopped / CHECKPOINT).read_bytes()
    for damaged in damages(data):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoint\.safetensors"):
            load_checkpoint(path, state, fingerprint)
    assert all(torch.equal(t, before[name]) for name, t in state.trainables.tensors().items())
    assert drawn_next(state) == numbers
    assert not any(optimizer.state for optimizer in state.trainables.optimizers.values())
    path.write_bytes(data)
    load_checkpoint(path, state, fingerprint)
    assert state.step == 2


@pytest.mark.parametrize("part", ["teacher/", "student/", "rows/", "critics/", "optimizers/critics/", "generators/"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused(stopped, tmp_path, part):
    tensors, metadata = read_tensors(stopped / CHECKPOINT), read_header(stopped / CHECKPOINT).metadata
    del tensors[random.Random(0).choice(sorted(n for n in tensors if n.startswith(part)))]
    write_tensors(tmp_path / "checkpoint", tensors, metadata)
    with pytest.raises(InputError, match="checkpoint is damaged"):
        load_checkpoint(tmp_path / "checkpoint", state_of(), run.open_run(stopped).fingerprint("distil"))


def test_a_run_with_a_bad_checkpoint_is_refused_and_nothing_is_overwritten(folder, reference):
    other = reference.echo["echo/checkpoint.safetensors"]
    good = (folder / CHECKPOINT).read_bytes()
    for bad, reason in ((good[:-1], "truncated"), (other, "another run"), (b"", "at least 8"), (b"{}" * 99, "sound")):
        (folder / CHECKPOINT).write_bytes(bad)
        before = tree(folder)
        with pytest.raises(InputError, match=reason):
            train(folder)
        assert tree(folder) == before
    (folder / CHECKPOINT).write_bytes(good)
    train(folder)
    assert difference(tree(folder), reference.distil) == []


def test_an_echo_needs_the_first_stage_s_checkpoint(reference, tmp_path):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is missing"):
        echo(tmp_path)


# Refused, or the same run


def other_value(field):
    """A value that is allowed and not what the runs here have."""
    value, meta = getattr(settings(), field.name), field.metadata
    if isinstance(value, bool):
        return not value
    if meta["choices"]:
        return next(c for c in meta["choices"] if c != value)
    if isinstance(value, str):
        return {"device": "cpu:0", "extra_losses": "zebra=0", "extra_critics": "zebra=0"}.get(field.name, "zebra")
    step = 1 if isinstance(value, int) else 0.25
    return value + step if meta["high"] is None or value + step <= meta["high"] else value - step


def reopened(folder, pictures=None, **overrides):
    chosen, family = settings(**overrides), resume_worker.opened_family()
    images = session.square_images(
        (pictures or photographs())[: chosen.max_photographs or None], chosen.resolution or 64, chosen.crop
    )
    return resume.create_or_resume(folder, chosen, SOURCES, images, family)


@pytest.mark.parametrize(
    "name", [n for n in affecting_result(settings()) if n not in ("resolution", "max_photographs")]
)
def test_a_setting_that_determines_the_result_is_refused_by_name(folder, name):
    field = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    value, before = other_value(field), tree(folder)
    with pytest.raises(InputError, match="holds another run") as caught:
        reopened(folder, **{name: value})
    assert f": {name} is {getattr(settings(), name)!r} there and {value!r} here;" in str(caught.value)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"iterations": 6}, "iterations is 5 there and 6 here"),
        ({"resolution": 128}, "resolution is 64 there and 128 here"),
        ({"max_photographs": 1}, "max_photographs is 0 there and 1 here"),
        ({"preset": "tuned"}, "backbone_normalisation is False there and True here"),
        ({"class_noun": "cat", "student_lr": 1e-3}, "class_noun is 'dog' there and 'cat' here, student_lr is 2e-05"),
    ],
)
def test_a_changed_run_is_refused_before_it_is_touched(folder, overrides, named):
    before, when = tree(folder), times(folder)
    with pytest.raises(InputError, match=named):
        train(folder, **overrides)
    assert tree(folder) == before
    assert times(folder) == when


@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(TrainSettings) if f.name not in ("preset", *affecting_result(settings()))],
)
def test_a_setting_that_does_not_determine_the_result_may_change(folder, name):
    field = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    fingerprint = run.open_run(folder).fingerprint("distil")
    opened = reopened(folder, **{name: other_value(field)})
    assert opened.fingerprint("distil") == fingerprint
    assert getattr(run.open_run(folder).settings, name) == other_value(field)


def test_a_single_changed_pixel_is_another_run(folder):
    pictures = photographs()
    pixels = np.array(pictures[1].image)
    pixels[17, 30, 2] ^= 1
    before = tree(folder)
    for changed in (
        [pictures[0], Photograph("1.png", Image.fromarray(pixels))],
        pictures[::-1],
        pictures[:1],
        [*pictures, pictures[0]],
    ):
        with pytest.raises(InputError, match="holds another run: photographs is '"):
            train(folder, pictures=changed)
    assert tree(folder) == before


def test_photographs_that_were_moved_or_renamed_are_the_same_run(folder, tmp_path, reference):
    (tmp_path / "elsewhere").mkdir()
    for name, picture in zip(("a long name.bmp", "b.tiff"), photographs(), strict=True):
        picture.image.save(tmp_path / "elsewhere" / name)
    train(folder, pictures=load_photographs(tmp_path / "elsewhere"))
    assert difference(tree(folder), reference.distil) == []


def changed_family(what):
    parts = {"student": tiny_checkpoint("student"), "teacher": tiny_checkpoint("teacher")}
    if what == "text_encoder":
        for part in parts.values():
            next(iter(part["text_encoder"].values()))[0, 0] += 1
    else:
        next(t for n, t in parts[what]["unet"].items() if n.endswith("attn2.to_k.weight"))[0, 0] += 1
    return load_family(parts["student"], parts["teacher"], teacher_prediction="v_prediction", architecture=TINY)


@pytest.mark.parametrize("what", ["student", "teacher", "text_encoder"])
def test_other_models_are_another_run(folder, reference, what):
    before, echoed = tree(folder), tree(reference.folder)
    with pytest.raises(InputError, match=f"holds another run: {what} is '"):
        train(folder, family=changed_family(what))
    with pytest.raises(InputError, match=f"other models: {what} is '"):
        echo(reference.folder, family=changed_family(what))
    assert tree(folder) == before
    assert tree(reference.folder) == echoed


def test_another_prediction_type_is_another_run(folder):
    family = fresh_family()
    family.teacher.schedule = dataclasses.replace(family.teacher.schedule, prediction_type="epsilon")
    with pytest.raises(InputError, match=r"teacher is '\w+ \(v_prediction\)' there and '\w+ \(epsilon\)' here"):
        train(folder, family=family)


@pytest.mark.parametrize("field", dataclasses.fields(EchoSettings), ids=lambda f: f.name)
def test_an_echo_of_other_settings_is_refused_by_name(reference, field):
    value = getattr(ECHO, field.name)
    other = not value if isinstance(value, bool) else "a <new1> dog" if value == "" else 0.25 if value == 0.5 else 9
    with pytest.raises(InputError, match=f"other settings: {field.name} is {value!r} there and {other!r} here"):
        echo(reference.folder, how=dataclasses.replace(ECHO, **{field.name: other}))
    assert tree(reference.folder) == reference.echo


def test_without_its_folder_an_echo_may_be_done_again(reference, tmp_path):
    shutil.copytree(reference.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "echo")
    with pytest.raises(KeyboardInterrupt):
        echo(tmp_path, stop_at(PoolProgress), how=EchoSettings(iterations=1, pool_size=1))
    shutil.rmtree(tmp_path / "echo")
    echo(tmp_path)
    assert difference(tree(tmp_path), reference.echo) == []


def test_a_run_that_is_not_trained_to_its_end_is_not_echoed(folder):
    before = tree(folder)
    with pytest.raises(InputError, match="not trained to its end"):
        echo(folder)
    assert tree(folder) == before


def test_photographs_in_the_folder_that_were_changed_stop_an_echo(reference, tmp_path):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "photographs" / "000.png", tmp_path / "photographs" / "001.png")
    with pytest.raises(InputError, match="photographs was changed"):
        echo(tmp_path)


# Finished


def test_a_finished_run_is_found_finished_and_left_alone(reference, tmp_path):
    shutil.copytree(reference.folder, tmp_path, dirs_exist_ok=True)
    before = times(tmp_path)
    events = []
    complete(tmp_path, fresh_family(), events.append)
    assert events == []
    assert times(tmp_path) == before
    assert difference(tree(tmp_path), reference.echo) == []


@pytest.mark.parametrize("gone", [[], ["distil/student.safetensors"], ["distil/student.safetensors", CHECKPOINT]])
def test_results_that_were_written_but_not_recorded_are_completed(reference, tmp_path, gone):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "run.json").read_text())
    record["finished"] = {}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for name in gone:
        (tmp_path / name).unlink()
    events = []
    train(tmp_path, events.append)
    assert len([e for e in events if isinstance(e, StepDone)]) == (STEPS if CHECKPOINT in gone else 0)
    assert difference(tree(tmp_path), reference.distil) == []


# Full disks


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "limit"])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, reference, monkeypatch, call):
    resource = pytest.importorskip("resource") if call == "limit" else None
    kept = {}

    def fill(event):
        if isinstance(event, CheckpointSaved):
            kept["checkpoint"] = event.path.read_bytes()
        if isinstance(event, StepDone) and event.step == 4:
            if resource:
                resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            else:
                monkeypatch.setattr(os, call, no_space)

    try:
        with pytest.raises(StorageError, match=r"checkpoint\.safetensors could not be written: .*(free space|limit)"):
            train(tmp_path, fill)
    finally:
        monkeypatch.undo()
        if resource:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    found = tree(tmp_path)
    assert found[CHECKPOINT] == kept["checkpoint"]
    assert not [name for name in found if name.endswith(".tmp")]
    state = state_of()
    load_checkpoint(tmp_path / CHECKPOINT, state, run.open_run(tmp_path).fingerprint("distil"))
    assert state.step == 2
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def test_a_log_that_could_not_be_written_loses_no_rows(tmp_path, reference, monkeypatch):
    # The stop's own checkpoint succeeds here, and must not leave the iterations before it out of the log.
    append, calls = run.append_line, iter(range(100))
    monkeypatch.setattr(run, "append_line", lambda path, line: no_space() if next(calls) == 1 else append(path, line))
    with pytest.raises(OSError, match="No space"):
        train(tmp_path, log_every=2)
    assert read_header(tmp_path / CHECKPOINT).metadata["step"] == "4"
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


# Folders


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    for path, reason in ((tmp_path / "file", "is a file"), (tmp_path / "full", "is not empty")):
        if "file" in reason:
            path.write_text("mine")
        else:
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(InputError, match=f"out folder .*{path.name} {reason}"):
            train(path)
        assert tree(tmp_path) == before


def test_the_leftovers_of_a_killed_start_are_no_obstacle(tmp_path, reference):
    (tmp_path / ".run.json.4711.tmp").write_text('{"format_ver')
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at(StepDone, step=1))
    for place in (".", "photographs", "distil", "distil/samples"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / ".something.4711.tmp").write_bytes(b"\0" * 100)
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def test_reading_a_run_leaves_what_another_process_is_writing(folder):
    (folder / "distil" / ".checkpoint.safetensors.4711.tmp").write_bytes(b"half")
    before = tree(folder)
    run.open_run(folder)
    assert tree(folder) == before


def test_a_failed_start_leaves_no_folder(tmp_path):
    for overrides in ({"resolution": 96 + 1}, {"placeholder": "dog"}, {"class_noun": " "}):
        with pytest.raises(InputError):
            train(tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


# Killed


def writing(file, nth=1):
    """The moments of writing one file whole: half of it, all of it under the temporary name, and in its place.

    A process that is killed before "open" or "sync" leaves the disk as it is before one of these.
    """
    return [["write", file, nth], ["rename", file, 1], ["sync folder", file, 1]]


def training(stage):
    """The moments of a stage's first two checkpoints, its log rewound between them, and its results."""
    log, checkpoint = f"{stage}/log.jsonl", f"{stage}/checkpoint.safetensors"
    return [
        ["append", log, 1],
        ["write", log, 1],
        ["append", log, 2],
        *writing(checkpoint, nth=80),
        *writing(log),
        ["append", log, 1],
        *writing(checkpoint),
        *writing(f"{stage}/teacher.safetensors", nth=2),
        *writing(f"{stage}/student.safetensors", nth=2),
        *writing("run.json"),
    ]


DISTIL_KILLS = [
    ["mkdir", ".", 1],
    *writing("run.json"),
    ["mkdir", "photographs", 1],
    *writing("photographs/000.png", nth=3),
    *writing("photographs/001.png"),
    ["mkdir", "distil", 1],
    *training("distil"),
]
ECHO_KILLS = [
    *writing("run.json"),
    ["mkdir", "echo/pool", 1],
    ["mkdir", "echo", 1],
    *writing("echo/pool/000.png", nth=3),
    *writing("echo/pool/001.png"),
    *writing("echo/pool/pool.json"),
    *training("echo"),
]
RANDOM = random.Random(2024)
TIMED_KILLS = [[RANDOM.uniform(0.02, 0.98)] for _ in range(6)] + [[RANDOM.uniform(0.2, 0.7) for _ in range(4)]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, reference):
    """What became of runs in processes that were killed, by the worker beside this file."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(reference.distil_folder, folder / "echo")
    jobs = [{"folder": "undisturbed", "kills": []}, {"folder": "distil", "kills": DISTIL_KILLS}]
    jobs.append({"folder": "echo", "kills": ECHO_KILLS})
    jobs += [{"folder": f"timed{i}", "kills": kills} for i, kills in enumerate(TIMED_KILLS)]
    for job in jobs:
        job["folder"] = str(folder / job["folder"])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    here = Path(echodistill_core.__file__).parents[1]
    worker = subprocess.run(
        [sys.executable, resume_worker.__file__, folder / "jobs.json", folder / "reports.json"],
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
    report = json.loads((folder / "reports.json").read_text())
    hits = {Path(job["folder"]).name: hit for job, hit in zip(jobs[1:], report["hits"], strict=True)}
    return SimpleNamespace(folder=folder, moments=report["undisturbed"], hits=hits)


@posix_only
@pytest.mark.slow
def test_a_process_of_its_own_makes_the_same_run(killed, reference):
    assert difference(tree(killed.folder / "undisturbed"), reference.echo) == []


@posix_only
@pytest.mark.slow
def test_every_kind_of_write_was_killed(killed):
    # Logs are written whole only when a run goes on, to drop what it will do again.
    rewinding = {(op, f"{stage}/log.jsonl") for stage in run.STAGES for op in ("write", "rename", "sync folder")}
    planned = {(op, file) for op, file, _ in DISTIL_KILLS + ECHO_KILLS}
    happened = {tuple(moment) for moment in killed.moments}
    assert {(op, file) for op, file in happened if op not in ("open", "sync")} == planned - rewinding


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("distil", DISTIL_KILLS), ("echo", ECHO_KILLS)])
def test_killed_at_every_moment_of_every_write_it_ends_the_same(killed, reference, name, kills):
    assert [kill for kill, hit in zip(kills, killed.hits[name], strict=False) if not hit] == []
    assert killed.hits[name][-1] is False
    assert difference(tree(killed.folder / name), reference.echo) == []


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(TIMED_KILLS)))
def test_killed_at_any_time_it_ends_the_same(killed, reference, i):
    assert any(killed.hits[f"timed{i}"])
    assert difference(tree(killed.folder / f"timed{i}"), reference.echo) == []


# Writing behind training, as on a GPU


@pytest.fixture
def behind(monkeypatch):
    """Every checkpoint is written in a thread, on this CPU too."""
    from echodistill_core.training import loop
    from echodistill_core.training.checkpoint import CheckpointWriter

    writers = []

    def make(background):
        writers.append(CheckpointWriter(background=True))
        return writers[-1]

    monkeypatch.setattr(loop, "CheckpointWriter", make)
    return writers


def test_a_checkpoint_written_behind_training_holds_its_own_step(train_tiny, tmp_path, behind, monkeypatch):
    """Training has gone on by the time the bytes are written: they must be those of the step, not of later ones."""
    from echodistill_core.training import checkpoint

    write, gate, seen = checkpoint.write_tensors, threading.Event(), []

    def slow(path, tensors, metadata):
        gate.wait(60)
        write(path, tensors, metadata)
        seen.append((int(metadata["step"]), path.read_bytes()))

    monkeypatch.setattr(checkpoint, "write_tensors", slow)

    def listen(event):
        if isinstance(event, StepDone) and event.step == 2:
            gate.set()  # only now may the checkpoint of step 1 be written

    train_tiny(tmp_path / "run", iterations=3, checkpoint_every=1, listen=listen)
    assert len(behind) == 1
    assert [step for step, _ in seen] == [1, 2, 3]
    monkeypatch.undo()
    kept = []

    def keep(event):
        if isinstance(event, CheckpointSaved):
            kept.append((event.step, event.path.read_bytes()))

    train_tiny(tmp_path / "at once", iterations=3, checkpoint_every=1, listen=keep)
    assert seen == kept


def test_a_disk_that_is_full_behind_training_stops_it(train_tiny, tmp_path, behind, monkeypatch):
    from echodistill_core.training import checkpoint

    def full(path, tensors, metadata):
        raise StorageError(f"{path} could not be written: no space left; free space.")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(StorageError, match="no space left"):
        train_tiny(tmp_path / "run", iterations=3, checkpoint_every=1)
    assert not run.open_run(tmp_path / "run").is_finished("distil")


def test_a_stop_waits_for_the_checkpoint_behind_it(train_tiny, tmp_path, behind):
    class StopError(Exception):
        pass

    def stop(event):
        if isinstance(event, StepDone) and event.step == 2:
            raise StopError

    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", iterations=4, listen=stop)
    steps = []
    again = train_tiny(
        tmp_path / "run", iterations=4, listen=lambda e: steps.append(e.step) if isinstance(e, StepDone) else None
    )
    assert steps == [3, 4]
    control = train_tiny(tmp_path / "control", iterations=4)
    for name in ("student.safetensors", "teacher.safetensors", "checkpoint.safetensors"):
        assert again.path("distil", name).read_bytes() == control.path("distil", name).read_bytes()
