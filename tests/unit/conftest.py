"""Fixtures for tests that need photographs, a tiny family or a tiny run. Everything here works offline on the CPU.

make_photographs(count=3, size=96, seed=0) -> Path      a folder of generated PNGs; equal arguments, equal pixels
photographs -> Path                                     make_photographs() with its defaults
quick_settings(**overrides) -> TrainSettings            the paper's settings, cut down to a fraction of a second
tiny_family(**changes) -> Family                        a new tiny family, at each call with weights of its own
tiny_state(family=None, **overrides) -> TrainState      a run in memory at step 0 with quick_settings(**overrides)
draw_batch(state, step=0, images=None) -> Batch         its batch of this step, from the state's own generators
train_tiny(folder, family=None, listen=..., photographs=..., **overrides) -> Run     a whole distillation stage
snapshot(state) -> dict[str, Tensor]                    a copy of every tensor there is in a run, by name
changed(before, after) -> set[str]                      the names whose tensors are not bit-equal
parts -> dict                                           the tiny student's networks as tensors, once for each file
empty_cache -> Path                                     a Hugging Face cache that holds nothing, for this test

The fixtures are functions to be called, so that one test can have several of each.
"""

import os

# The networks are so small that a second thread costs more than it brings, and up to ten times as much on a busy
# machine. Set before torch is imported, and inherited by child processes, so that these sum in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_core.concept.images import ImageSet, square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.models.text import TextEncoder
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.perception.load import load_backbones
from echodistill_core.settings import TrainSettings, from_options
from echodistill_core.training import session
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.build import needed_backbones, new_state

# Modules whose tests need no model: `pytest -m fast tests/unit` takes under a minute on two cores.
FAST = (
    "adversarial", "cli_download", "cli_environment", "cli_flags", "color", "color_profiles", "compute", "contents",
    "decoding", "demo_page", "demo_task", "diffusion", "eventlog", "extending_evaluation", "files", "finding",
    "foreign", "jpeg_damage", "layers", "loss_schedule", "metrics", "ms_swd", "objectives", "old_logs",
    "photographs", "pictures", "png_text", "project_files", "registry", "report", "run_pictures", "settings",
    "sheets", "statistics", "tensorfile", "tensorfile_foreign", "tensorheader", "weightfiles", "world",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests of the modules in FAST as `fast`, except those that are `slow`."""
    here = Path(__file__).parent
    unknown = set(FAST) - {path.stem.removeprefix("test_") for path in here.rglob("test_*.py")}
    if unknown:
        raise pytest.UsageError(f"{__file__}: FAST names {sorted(unknown)}, but no such test_*.py is in {here}.")
    for item in items:
        if item.path.stem.removeprefix("test_") in FAST and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


TINY_SOURCES = ModelSources(family="tiny")


def _quick_settings(**overrides):
    quick = {"class_noun": "dog", "device": "cpu", "iterations": 2, "batch_size": 1, "swd_projections": 8}
    return from_options(TrainSettings, {**quick, "log_every": 1, "preview_every": 0, **overrides})


@pytest.fixture(scope="session")
def quick_settings():
    """quick_settings(**overrides): the paper's settings with few iterations, one image each, and no previews."""
    return _quick_settings


@pytest.fixture(scope="session")
def make_photographs(tmp_path_factory):
    """make_photographs(count, size, seed): a folder with 0.png, 1.png, ...: smooth colours with a disc somewhere."""

    @cache
    def make(count=3, size=96, seed=0):
        folder = tmp_path_factory.mktemp("photographs")
        random = np.random.default_rng(seed)
        y, x = np.mgrid[:size, :size] / size
        for i in range(count):
            slopes = random.uniform(-120, 120, (2, 3))
            pixels = 128 + (x - 0.5)[..., None] * slopes[0] + (y - 0.5)[..., None] * slopes[1]
            cx, cy, radius = random.uniform((0.3, 0.3, 0.1), (0.7, 0.7, 0.3))
            pixels[np.hypot(x - cx, y - cy) < radius] = random.uniform(0, 255, 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def photographs(make_photographs):
    """A folder with 3 photographs of 96x96. Read only: every test shares it."""
    return make_photographs()


@pytest.fixture(scope="module")
def parts():
    """The tiny student's `unet`, `vae` and `text_encoder` in the names of diffusers. Copy before changing one."""
    return tiny_checkpoint("student")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The folder of an empty Hugging Face cache, which the hub's client uses during this test."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def tiny_family():
    """tiny_family(**changes): a new frozen tiny family (v-prediction teacher); changes replace its fields."""

    checkpoints = {role: tiny_checkpoint(role) for role in ("student", "teacher")}

    def copy(role):
        return {
            part: {n: t.clone() for n, t in tensors.items()} if isinstance(tensors, dict) else tensors
            for part, tensors in checkpoints[role].items()
        }

    def make(**changes):
        # As open_family makes it, without drawing the same random weights each time.
        family = load_family(
            copy("student"),
            copy("teacher"),
            name="tiny",
            teacher_prediction="v_prediction",
            architecture=TINY,
            licences=dict.fromkeys(("teacher", "student"), "MIT (random weights)"),
        )
        return replace(family, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_state(tiny_family):
    """tiny_state(family=None, **overrides): a TrainState at step 0, with just the backbones its settings need."""

    @cache
    def tokenizer(placeholder):
        return tiny_family().text.with_placeholders({placeholder: 1}).tokenizer

    def make(family=None, **overrides):
        settings = _quick_settings(**overrides)
        family = family or tiny_family()
        # What with_placeholders does, without copying the whole vocabulary for every state; nothing here changes it.
        family.text = TextEncoder(family.text.model, family.text.tokenizer)
        family.text.tokenizer = tokenizer(settings.placeholder)
        family.text.placeholders = {settings.placeholder: settings.vectors}
        return new_state(family, load_backbones(needed_backbones(settings), "tiny"), settings)

    return make


@pytest.fixture(scope="session")
def draw_batch(photographs):
    """draw_batch(state, step=0, images=None): what session.train would give this state's next iteration."""

    def draw(state, step=0, images=None):
        if not isinstance(images, ImageSet):
            images = square_images(
                load_photographs(images or photographs), state.family.architecture.resolution, "center"
            )
        source = TrainingImages(images, state.settings, state.family.latent_factor)
        return source.draw(step, state.random.generators["data"])

    return draw


@pytest.fixture(scope="session")
def train_tiny(tiny_family, photographs):
    """train_tiny(folder, family=None, listen=..., photographs=..., **overrides): session.train on the tiny family."""
    default = photographs

    def train(folder, family=None, listen=lambda event: None, photographs=None, **overrides):
        pictures = load_photographs(photographs or default)
        settings = _quick_settings(**overrides)
        return session.train(pictures, family or tiny_family(), settings, TINY_SOURCES, folder, listen)

    return train


def _family_tensors(family):
    modules = {"student": family.student.unet, "text": family.text.model, "vae": family.vae}
    if family.teacher is not None:
        modules["teacher"] = family.teacher.unet
    return {f"{m}/{n}": t for m, module in modules.items() for n, t in module.state_dict().items()}


@pytest.fixture(scope="session")
def snapshot():
    """snapshot(state or family): copies of all tensors of teacher/, student/, text/, vae/, backbone names, rows/."""

    def take(thing):
        tensors = _family_tensors(getattr(thing, "family", thing))
        if hasattr(thing, "family"):
            for role, backbone in thing.backbones.items():
                tensors.update({f"{role}/{n}": t for n, t in backbone.state_dict().items()})
            tensors.update({f"rows/{role}": t for role, t in thing.trainables.token_embeddings.items()})
            tensors.update({f"critics/{n}": t for n, t in thing.trainables.critics.state_dict().items()})
        return {n: t.detach().clone() for n, t in tensors.items()}

    return take


@pytest.fixture(scope="session")
def changed():
    """changed(before, after): names of the tensors that differ in a single bit, or are in one snapshot only."""

    def compare(before, after):
        both = before.keys() & after.keys()
        return {n for n in both if not _same_bits(before[n], after[n])} | (before.keys() ^ after.keys())

    return compare


def _same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, since NaN is not equal to itself and -0 is equal to 0.
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
