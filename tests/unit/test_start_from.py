"""Runs that start from adapters: teacher-first, further training, and refused starts."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from run_files import silent, stop_at, tree

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.cli import main
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.errors import InputError
from echodistill_core.models.sources import ModelSources
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import EchoSettings
from echodistill_core.training import session
from echodistill_core.training.build import needed_backbones, new_state, token_learns_from
from echodistill_core.training.events import StepDone
from echodistill_core.training.loop import adapters_of
from echodistill_core.training.run import open_run
from echodistill_core.training.start import read_start, start_files
from echodistill_core.training.steps import critic_step, student_step, teacher_step

TEACHER_ALONE = {"alignment_weight": 0.0, "adversarial_weight": 0.0, "teacher_lr": 1e-2, "token_lr": 1e-2}
TEACHER_FIRST = {"teacher_weight": 0.0, "identity_weight": 0.0, "swd_weight": 0.0, "adversarial_weight": 0.0}
SOURCES = ModelSources(family="tiny")


@pytest.fixture(scope="module")
def teacher_run(train_tiny, tmp_path_factory):
    """A finished run that trained only the teacher, with large updates. Read only."""
    return train_tiny(tmp_path_factory.mktemp("teacher_run") / "run", seed=3, **TEACHER_ALONE)


@pytest.fixture(scope="module")
def teacher_file(teacher_run):
    return teacher_run.path("distil", "teacher.safetensors")


@pytest.fixture
def train_from(tiny_family, quick_settings, photographs):
    """train_from(folder, start, family=None, listen=..., **overrides): session.train with start files."""

    def train(folder, start, family=None, listen=silent, **overrides):
        pictures, settings = load_photographs(photographs), quick_settings(**overrides)
        return session.train(pictures, family or tiny_family(), settings, SOURCES, folder, listen, start)

    return train


@pytest.fixture
def state_from(tiny_family, quick_settings):
    """state_from(start, **overrides): a TrainState at step 0 that starts from these files."""

    def make(start, **overrides):
        family, settings = tiny_family(), quick_settings(**overrides)
        family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
        backbones = load_backbones(needed_backbones(settings), "tiny")
        return new_state(family, backbones, settings, read_start(start, family, settings))

    return make


# --- teacher-first --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_teacher_has_the_adapters_weights_and_token(state_from, tiny_family, teacher_file, precision):
    state = state_from({"teacher": teacher_file}, precision=precision, **TEACHER_FIRST)
    plain = tiny_family().to("cpu", {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    t, prompts = torch.tensor([10, 900]), ["photo of a <new1> dog", "<new1> dog in snow"]
    before = plain.teacher.unet(z.to(plain.vae.dtype), t, plain.text(["photo", "snow"])).sample
    with torch.no_grad(), personalised(plain, [read_adapter(teacher_file)], role="teacher") as model:
        expected, text = model.denoiser.predict(z, t, model.condition(prompts)), model.condition(prompts)
        assert torch.equal(state.condition(prompts, "teacher").features, text.features)
        assert torch.equal(state.condition(prompts, "student").features, text.features)
        assert torch.equal(state.family.teacher.predict(z, t, text), expected)
        changed = model.denoiser.unet(z.to(plain.vae.dtype), t, plain.text(["photo", "snow"])).sample
    assert (changed - before).abs().max() > 1e-3  # it did learn something


def test_only_the_student_learns_and_the_token_stays(state_from, draw_batch, snapshot, changed, teacher_file):
    state = state_from({"teacher": teacher_file}, teacher_weight=0.0)
    assert token_learns_from(state.settings, state.started) == "teacher"
    before = snapshot(state)
    for step in range(2):
        batch = draw_batch(state, step)
        assert teacher_step(state, batch) == {}
        losses, made = student_step(state, batch)
        assert {"identity", "mse", "swd", "alignment", "adv_clip"} <= losses.keys()
        critic_step(state, batch, made)
    found = changed(before, snapshot(state))
    students = {f"student/{n}" for n in state.trainables.weights["student"].parameters}
    assert {n for n in found if not n.startswith("critics/")} == students


def test_a_teacher_first_run_ends_with_the_students_adapter_and_the_teachers_token(
    train_from, tiny_family, snapshot, changed, teacher_file, tmp_path
):
    family = tiny_family()
    before = snapshot(family)
    run = train_from(tmp_path / "run", {"teacher": teacher_file}, family, **TEACHER_FIRST)
    assert changed(before, snapshot(family)) == set()  # restored
    assert sorted(p.name for p in run.path("distil").glob("*.safetensors")) == [
        "checkpoint.safetensors",
        "student.safetensors",
    ]
    student = read_adapter(run.path("distil", "student.safetensors"))
    assert torch.equal(student.token_embeddings, read_adapter(teacher_file).token_embeddings)
    assert max(d.abs().max().item() for d in student.all_deltas().values()) > 0
    assert (run.folder / "start" / "teacher.safetensors").read_bytes() == teacher_file.read_bytes()


def test_without_a_teacher_adapter_the_student_trains_the_token(state_from, teacher_run):
    state = state_from({"student": teacher_run.path("distil", "student.safetensors")}, **TEACHER_FIRST)
    assert token_learns_from(state.settings, state.started) == "student"
    assert any(p is state.trainables.token_embeddings["student"] for p in state.trainables.parameters("student"))


def test_without_a_shared_text_encoder_each_role_starts_from_its_own_token(state_from, tiny_family, teacher_file):
    state = state_from({"teacher": teacher_file}, share_text_encoder=False, **TEACHER_FIRST)
    assert torch.equal(state.trainables.token_embeddings["teacher"].data, read_adapter(teacher_file).token_embeddings)
    assert torch.equal(state.trainables.token_embeddings["student"].data, tiny_family().text.noun_embeddings("dog", 1))
    assert [p is state.trainables.token_embeddings["student"] for p in state.trainables.parameters("student")].count(
        True
    ) == 1


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["kv+token", "lora+token", "full+token"])
def test_training_starts_from_the_adapters_weights(train_tiny, state_from, tmp_path, trainable):
    overrides = {"trainable": trainable, "lora_rank": 2, "mse_weight": 1.0, "identity_weight": 0.0, "swd_weight": 0.0}
    rates = {"adversarial_weight": 0.0, "teacher_lr": 1e-3, "student_lr": 1e-3, "token_lr": 1e-3}
    run = train_tiny(tmp_path / "run", **overrides, **rates)
    files = start_files([run.folder])
    assert files == {role: run.path("distil", f"{role}.safetensors") for role in ("student", "teacher")}
    state = state_from(files, **overrides, adversarial_weight=0.0)
    for role, found in adapters_of(state, "distil", 0).items():
        expected = read_adapter(files[role])
        assert torch.equal(found.token_embeddings, expected.token_embeddings)
        assert found.factors.keys() == expected.factors.keys()
        for name, (up, down) in expected.factors.items():
            assert torch.equal(found.factors[name][0], up)
            assert torch.equal(found.factors[name][1], down)
        ours, theirs = found.all_deltas(), expected.all_deltas()
        assert ours.keys() == theirs.keys()
        for name, delta in theirs.items():
            torch.testing.assert_close(ours[name], delta, rtol=0, atol=1e-6)
        assert max(d.abs().max().item() for d in theirs.values()) > 1e-4
    assert state.trainables.token_embeddings["student"] is state.trainables.token_embeddings["teacher"]
    assert any(p is state.trainables.token_embeddings["teacher"] for p in state.trainables.parameters("teacher"))


# --- identity, resuming, the echo -----------------------------------------------------------------


def test_the_content_of_a_start_file_is_part_of_the_runs_identity(train_from, train_tiny, teacher_file, tmp_path):
    start = {"teacher": teacher_file}
    run = train_from(tmp_path / "run", start, **TEACHER_FIRST)
    before = tree(run.folder)
    elsewhere = tmp_path / "another name.safetensors"
    shutil.copy(teacher_file, elsewhere)
    train_from(tmp_path / "run", {"teacher": elsewhere}, **TEACHER_FIRST)
    assert tree(run.folder) == before
    other = train_tiny(tmp_path / "other", seed=4, **TEACHER_ALONE).path("distil", "teacher.safetensors")
    with pytest.raises(InputError, match=r"start_teacher is '\w{16}' there and '\w{16}' here"):
        train_from(tmp_path / "run", {"teacher": other}, **TEACHER_FIRST)
    with pytest.raises(InputError, match=r"start_teacher is '\w{16}' there and None here"):
        train_from(tmp_path / "run", None, **TEACHER_FIRST)
    assert tree(run.folder) == before


def test_a_stopped_run_and_its_echo_end_the_same_without_the_original_file(
    train_from, tiny_family, teacher_file, tmp_path
):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(teacher_file, mine)
    whole = train_from(tmp_path / "whole", {"teacher": mine}, **TEACHER_FIRST)
    with pytest.raises(KeyboardInterrupt):
        train_from(tmp_path / "run", {"teacher": mine}, listen=stop_at(StepDone, step=1), **TEACHER_FIRST)
    run = train_from(tmp_path / "run", {"teacher": mine}, **TEACHER_FIRST)
    assert tree(run.folder) == tree(whole.folder)
    mine.unlink()
    settings = EchoSettings(iterations=2, pool_size=1)
    session.echo(whole, tiny_family(), settings, silent)
    with pytest.raises(KeyboardInterrupt):
        session.echo(run, tiny_family(), settings, stop_at(StepDone, step=1))
    session.echo(run, tiny_family(), settings, silent)
    assert tree(run.folder) == tree(whole.folder)
    echoed = read_adapter(run.path("echo", "student.safetensors"))
    assert torch.equal(echoed.token_embeddings, read_adapter(teacher_file).token_embeddings)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_an_echo_needs_the_file_that_the_run_began_from(train_from, tiny_family, teacher_file, tmp_path, damage):
    run = train_from(tmp_path / "run", {"teacher": teacher_file}, **TEACHER_FIRST)
    kept = run.folder / "start" / "teacher.safetensors"
    if damage == "gone":
        kept.unlink()
    else:
        kept.write_bytes(run.path("distil", "student.safetensors").read_bytes())
    expected = "was changed since training" if damage == "changed" else "cannot be read"
    with pytest.raises(InputError, match=rf"teacher\.safetensors {expected}"):
        session.echo(open_run(run.folder), tiny_family(), EchoSettings(pool_size=1), silent)


def test_info_lists_what_a_run_began_from(teacher_run, train_from, teacher_file, tmp_path, capsys):
    train_from(tmp_path / "run", {"teacher": teacher_file}, iterations=1, **TEACHER_FIRST)
    for folder, began_from in ((tmp_path / "run", {"teacher": "start/teacher.safetensors"}), (teacher_run.folder, {})):
        assert main(["info", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["start_from"] == began_from
    assert main(["info", str(tmp_path / "run")]) == 0
    assert re.search(r"^start_from\n +teacher  start/teacher\.safetensors$", capsys.readouterr().out, re.MULTILINE)


# --- what is refused, before anything is computed or written --------------------------------------


@pytest.mark.parametrize(
    ("role", "overrides", "message"),
    [
        ("student", {}, "belongs to the teacher"),
        ("teacher", {"placeholder": "<new2>"}, "placeholder '<new1>', but this run has '<new2>'"),
        ("teacher", {"class_noun": "cat"}, "class_noun 'dog', but this run has 'cat'"),
        ("teacher", {"vectors": 2}, "1 token embeddings, but setting vectors is 2"),
        ("teacher", {"teacher_weight": 1.0, "trainable": "token"}, "does not learn with trainable token"),
        ("teacher", {"teacher_weight": 1.0, "trainable": "lora"}, "full difference for .* low-rank"),
        ("teacher", {"trainable": "token"}, "nothing would learn with trainable token"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    train_from, teacher_file, tmp_path, monkeypatch, role, overrides, message
):
    monkeypatch.setattr(session, "load_backbones", lambda *args: pytest.fail("something was begun"))
    with pytest.raises(InputError, match=message):
        train_from(tmp_path / "run", {role: teacher_file}, **{**TEACHER_FIRST, **overrides})
    assert not (tmp_path / "run").exists()


def test_a_start_on_another_base_is_refused(train_from, tiny_family, teacher_file, tmp_path):
    family = tiny_family()
    other = tiny_family(teacher=replace(family.teacher, fingerprint="0" * 16))
    with pytest.raises(InputError, match=r"another base model"):
        train_from(tmp_path / "run", {"teacher": teacher_file}, other, **TEACHER_FIRST)
    alone = {"teacher_weight": 0.0, "alignment_weight": 0.0}  # which need no teacher but for its token
    with pytest.raises(InputError, match="need a teacher and none was given"):
        train_from(tmp_path / "run", {"teacher": teacher_file}, tiny_family(teacher=None), **alone)
    assert not (tmp_path / "run").exists()


def test_low_rank_updates_of_another_rank_are_refused(train_tiny, train_from, tmp_path):
    low = {"trainable": "lora", "alignment_weight": 0.0, "adversarial_weight": 0.0, "iterations": 1}
    run = train_tiny(tmp_path / "low", lora_rank=2, **low)
    with pytest.raises(InputError, match=r"rank 2 for .* rank 3"):
        train_from(tmp_path / "run", start_files([run.folder]), lora_rank=3, **low)
    assert not (tmp_path / "run").exists()


def test_two_different_tokens_cannot_be_shared(train_tiny, train_from, tmp_path):
    own = {"share_text_encoder": False, "identity_weight": 0.0, "swd_weight": 0.0, "adversarial_weight": 0.0}
    start = start_files([train_tiny(tmp_path / "own", **own).folder])
    with pytest.raises(InputError, match="different tokens"):
        train_from(tmp_path / "run", start, **{**own, "share_text_encoder": True})
    state = train_from(tmp_path / "run", start, iterations=1, **own)
    assert state.is_finished("distil")


def test_files_are_found_by_run_and_role(teacher_run, teacher_file, tmp_path):
    assert start_files([teacher_file]) == {"teacher": teacher_file}
    assert start_files([]) == {}
    student = teacher_run.path("distil", "student.safetensors")
    assert start_files([student, teacher_file]) == {"teacher": teacher_file, "student": student}
    with pytest.raises(InputError, match=r"both .*teacher\.safetensors and .*teacher\.safetensors"):
        start_files([teacher_run.folder, teacher_file])
    with pytest.raises(InputError, match="does not exist"):
        start_files([tmp_path / "nothing"])
    with pytest.raises(InputError, match="is no run folder"):
        start_files([tmp_path])
    copy = shutil.copytree(teacher_run.folder, tmp_path / "copy")
    (copy / "distil" / "teacher.safetensors").unlink()
    with pytest.raises(InputError, match="has no finished stage to begin from"):
        start_files([copy])


# --- the command line -----------------------------------------------------------------------------


def test_train_starts_from_a_run_and_echo_continues_it(photographs, teacher_run, tmp_path, capsys):
    flags = ["--photos", str(photographs), "--class-noun", "dog", "--family", "tiny", "--device", "cpu"]
    weights = ["--teacher-weight", "0", "--identity-weight", "0", "--swd-weight", "0", "--adversarial-weight", "0"]
    folder = tmp_path / "run"
    train = ["train", *flags, *weights, "--iterations", "1", "--preview-every", "0", "--out", str(folder)]
    assert main([*train, "--start-from", str(teacher_run.folder)]) == 0
    identity = json.loads((folder / "run.json").read_text())["identity"]
    assert {"start_teacher", "start_student"} <= identity.keys()
    assert sorted(p.name for p in (folder / "start").iterdir()) == ["student.safetensors", "teacher.safetensors"]
    assert main(["echo", str(folder), "--iterations", "1", "--pool-size", "1"]) == 0
    with Image.open(folder / "echo" / "pool" / "000.png") as picture:
        assert picture.size == (64, 64)
    capsys.readouterr()
    assert main([*train, "--start-from", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
