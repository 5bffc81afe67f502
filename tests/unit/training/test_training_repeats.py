"""Equal seeds give equal files, whatever the global random state, the process or the order of drawing."""

import random

import numpy as np
import pytest
import torch
from children import run_child
from run_files import silent, stage_files

from echodistill_core.concept.images import square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.settings import EchoSettings
from echodistill_core.training import session
from echodistill_core.training.batches import TrainingImages, batches
from echodistill_core.training.loop import preview
from echodistill_core.training.run import open_run
from echodistill_core.training.steps import iterate


@pytest.mark.slow
def test_same_seed_same_files_and_other_seed_others(train_tiny, photographs, tmp_path):
    first, again, other = (
        stage_files(train_tiny(tmp_path / name, iterations=3, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert set(first) == {"student.safetensors", "teacher.safetensors", "checkpoint.safetensors"}
    assert first == again
    assert all(first[name] != other[name] for name in first)
    # And in a process of its own.
    program = f"""
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.settings import TrainSettings, from_options
from echodistill_core.training.session import train
sources = ModelSources(family="tiny")
settings = from_options(TrainSettings, {{
    "class_noun": "dog", "device": "cpu", "iterations": 3, "batch_size": 1, "swd_projections": 8, "seed": 5,
    "log_every": 2, "preview_every": 2, "checkpoint_every": 1,
}})
photographs = load_photographs({str(photographs)!r})
train(photographs, open_family(sources), settings, sources, {str(tmp_path / "child")!r}, lambda event: None)
"""
    child = run_child(program)
    assert child.returncode == 0, child.stderr
    # It also logged, previewed and saved at other steps, which must not change the result.
    assert stage_files(open_run(tmp_path / "child")) == first


def test_training_draws_no_global_random_number(train_tiny, tiny_family, tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    run = train_tiny(tmp_path / "run", iterations=2, preview_every=1, trainable="lora+token")
    session.echo(run, tiny_family(), EchoSettings(iterations=1, pool_size=2), silent)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2][1]).all()  # noqa: NPY002


def test_the_global_seed_changes_nothing(tiny_state, draw_batch):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = tiny_state(trainable="lora+token")
        losses = [iterate(state, draw_batch(state, step)) for step in range(2)]
        results.append((losses, {n: t.clone() for n, t in state.trainables.tensors().items()}))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(t, results[1][1][n]) for n, t in results[0][1].items())


def test_the_largest_seed_works(tiny_state, draw_batch):
    state = tiny_state(seed=2**63 - 1)
    assert torch.isfinite(iterate(state, draw_batch(state))["alignment"])
    assert torch.isfinite(preview(state)).all()


def test_prefetched_batches_and_generator_states_equal_those_drawn_in_turn(photographs, quick_settings):
    images = square_images(load_photographs(photographs), 64, "center")
    source = TrainingImages(images, quick_settings(batch_size=2), 8)
    seen = {}
    for prefetch in (False, True):
        generator = torch.Generator().manual_seed(3)
        seen[prefetch] = [
            (batch.pixels, batch.real, batch.mask, batch.prompts, generator.get_state())
            for batch in batches(source, range(4, 9), generator, torch.device("cpu"), prefetch=prefetch)
        ]
    assert len(seen[True]) == 5
    for turn, early in zip(seen[False], seen[True], strict=True):
        assert turn[3] == early[3]
        assert all(torch.equal(a, b) for a, b in zip((*turn[:3], turn[4]), (*early[:3], early[4]), strict=True))
    assert list(batches(source, range(4, 4), generator, torch.device("cpu"), prefetch=True)) == []


def test_an_error_while_prefetching_is_raised_at_its_batch(photographs, quick_settings):
    images = square_images(load_photographs(photographs), 64, "center")
    source = TrainingImages(images, quick_settings(), 8)

    class Broken(TrainingImages):
        def draw(self, step, generator):
            if step == 2:
                raise RuntimeError("no such photograph")
            return source.draw(step, generator)

    drawn = batches(
        Broken(images, quick_settings(), 8), range(5), torch.Generator(), torch.device("cpu"), prefetch=True
    )
    assert [len(next(drawn)), len(next(drawn))] == [1, 1]
    with pytest.raises(RuntimeError, match="no such photograph"):
        next(drawn)


def test_training_works_inside_inference_mode(train_tiny, tiny_family, tmp_path):
    # As in ComfyUI, which runs nodes in inference mode.
    expected = stage_files(train_tiny(tmp_path / "outside"))
    with torch.inference_mode():
        assert stage_files(train_tiny(tmp_path / "inside")) == expected
