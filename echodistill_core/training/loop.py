"""The loop: Algorithm 1 until the stage's iterations are done, telling listeners and leaving checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapter.file import Adapter, describe_run, write_adapter
from ..concept.prompts import TEMPLATES, caption
from ..errors import DivergedError
from ..models import layout
from ..settings import affecting_result
from .batches import TrainingImages, batches
from .checkpoint import CheckpointWriter
from .events import CheckpointSaved, Listener, LossesLogged, PreviewReady, StepDone, latest
from .rates import decay, full_rates, set_rates
from .run import CHECKPOINT, Run
from .samples import one_step_images
from .schedule import schedule_of
from .state import TrainState
from .steps import iterate

PREVIEW_IMAGES = 4


def train_stage(
    state: TrainState, run: Run, stage: str, images: TrainingImages, iterations: int, listen: Listener
) -> None:
    """Train from state.step to `iterations`, then write the stage's adapters and mark it finished.

    listen: called after every iteration. An exception that it raises stops the stage after a checkpoint, so the
        listener is where a user's Cancel goes.
    Raises DivergedError naming term and step where a loss is not finite; the last good checkpoint stays.
    """
    # A CPU has no time to spare for what comes next, nor for writing what was.
    behind = state.device.type != "cpu"
    state.stage = stage
    with CheckpointWriter(behind=behind) as writer:
        _iterate_to(state, run, stage, images, iterations, listen, writer, ahead=behind)
    _finish(state, run, stage, iterations)


def _iterate_to(
    state: TrainState,
    run: Run,
    stage: str,
    images: TrainingImages,
    iterations: int,
    listen: Listener,
    writer: CheckpointWriter,
    *,
    ahead: bool,
) -> None:
    settings, rates = state.settings, full_rates(state)
    waiting: list[tuple[int, Mapping[str, Tensor]]] = []
    steps = range(state.step, iterations)
    for batch in batches(images, steps, state.random["data"], state.device, ahead=ahead):
        set_rates(state, rates, decay(settings.lr_decay, state.step, iterations))
        losses = iterate(state, batch)
        state.step += 1
        waiting.append((state.step, losses))
        last = state.step == iterations
        try:
            listen(StepDone(stage, state.step, iterations, losses))
            if last or state.step % settings.log_every == 0:
                listen(LossesLogged(stage, _log(run, stage, waiting)))
            if settings.preview_every and (last or state.step % settings.preview_every == 0):
                listen(PreviewReady(stage, state.step, preview(state)))
        except DivergedError:
            raise
        except BaseException:
            _save(state, run, stage, waiting, writer)
            raise
        if last or state.step % settings.checkpoint_every == 0:
            rows = _save(state, run, stage, waiting, writer)
            if rows:
                listen(LossesLogged(stage, rows))
            listen(CheckpointSaved(stage, state.step, run.path(stage, CHECKPOINT)))


def preview(state: TrainState) -> Tensor:
    """Samples of the student as it is, (4, 3, S, S) in [-1, 1], always of the same prompt and noise."""
    settings = state.settings
    prompt = caption(TEMPLATES[0], settings.placeholder, settings.class_noun)
    size = settings.resolution or state.family.architecture.resolution
    return one_step_images(state, [prompt] * PREVIEW_IMAGES, settings.seed, size)


def adapters_of(state: TrainState, stage: str, iterations: int) -> dict[str, Adapter]:
    """What each role has learned so far, by role."""
    architecture, result = state.family.architecture, {}
    for role, weights in state.trainables.weights.items():
        names = layout.unet_names(weights.base, architecture)
        factors = {names[n]: pair for n, pair in weights.factors().items()}
        result[role] = Adapter(
            token_embeddings=state.trainables.token_embeddings[role].detach().float().cpu(),
            deltas={} if factors else {names[n]: d for n, d in weights.deltas().items()},
            factors=factors,
            metadata=describe_run(state.family, role, affecting_result(state.settings), stage, iterations),
        )
    return result


def _log(run: Run, stage: str, waiting: list[tuple[int, Mapping[str, Tensor]]]) -> tuple[Mapping[str, float], ...]:
    """Read the waiting losses from the device, check them, write them to the log and return them."""
    rows = []
    values = iter(_read([value for _, losses in waiting for value in losses.values()]))
    for step, losses in waiting:
        row = dict(zip(losses, values, strict=False))
        for name, value in row.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {step} of the stage {stage}, so training stopped; the last good "
                    "checkpoint is kept. Lower the learning rates or that term's weight and train into a new folder."
                )
        rows.append({"step": step, **row})
    if rows:
        run.log(stage, tuple(rows))
    # Only now: where the log could not be written, the rows still wait for the next attempt.
    waiting.clear()
    return tuple(rows)


def _read(values: Sequence[Tensor]) -> list[float]:
    """Numbers of one element each, read from their device at once: each read by itself would wait for it."""
    found: list[float] = torch.stack([value.detach().reshape(()) for value in values]).tolist() if values else []
    return found


def _save(
    state: TrainState,
    run: Run,
    stage: str,
    waiting: list[tuple[int, Mapping[str, Tensor]]],
    writer: CheckpointWriter,
) -> tuple[Mapping[str, float], ...]:
    """Write a checkpoint, after the losses that led to it: nothing diverged may replace a good one."""
    rows = _log(run, stage, waiting)
    writer.save(run.path(stage, CHECKPOINT), state, run.fingerprint(stage))
    return rows


def _finish(state: TrainState, run: Run, stage: str, iterations: int) -> None:
    adapters = adapters_of(state, stage, iterations)
    for role, adapter in adapters.items():
        write_adapter(run.path(stage, f"{role}.safetensors"), adapter, state.family.architecture)
    losses = latest(run.read_log(stage)[-schedule_of(state.settings).period :])
    run.finish(stage, {"iterations": iterations, "roles": list(adapters), "losses": losses})
