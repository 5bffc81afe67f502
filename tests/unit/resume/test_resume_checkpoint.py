"""Checkpoints restore the whole state; damaged, incomplete or foreign ones are refused."""

import random
import shutil

import pytest
import torch
from resumed_runs import CHECKPOINT, advance, difference, drawn_next, echo, state_of, train
from run_files import tree

from echodistill_core.errors import InputError
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors
from echodistill_core.training import run
from echodistill_core.training.build import new_optimizers
from echodistill_core.training.checkpoint import load_checkpoint, save_checkpoint

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


def test_a_loaded_checkpoint_does_not_depend_on_its_file(tmp_path):
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
