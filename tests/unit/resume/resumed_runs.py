"""Runs of both stages for tests of resuming, and whole run folders compared byte by byte."""

import resume_worker
import torch
from resume_worker import ECHO, SOURCES, fresh_family, photographs, settings

from echodistill_core.perception.load import load_backbones
from echodistill_core.training import run, session
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.build import needed_backbones, new_state
from echodistill_core.training.steps import critic_step, student_step, teacher_step

CHECKPOINT = "distil/checkpoint.safetensors"
STEPS = settings().iterations


def train(folder, listen=resume_worker.ignore, pictures=None, family=None, **overrides):
    """The distillation stage as a process that has just begun would run it."""
    # Results must not depend on the state of the global generators.
    torch.seed()
    return session.train(
        pictures or photographs(), family or fresh_family(), settings(**overrides), SOURCES, folder, listen
    )


def echo(folder, listen=resume_worker.ignore, how=ECHO, family=None):
    torch.seed()
    return session.echo(run.open_run(folder), family or fresh_family(), how, listen)


def times(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def difference(a, b):
    """Names of the files that differ or are on one side only."""
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


def drawn_next(state):
    """The next 64 draws of each of the state's generators, which are not advanced."""
    return {name: torch.rand(64, generator=g.clone_state()).tolist() for name, g in state.random.generators.items()}


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
