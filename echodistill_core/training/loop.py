"""The training loop of a stage: iterations of Algorithm 1 with logs, previews, checkpoints and final adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapter.file import Adapter, run_metadata, write_adapter
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
from .schedule import loss_schedule
from .state import TrainState
from .steps import iterate

PREVIEW_IMAGES = 4


def train_stage(
    state: TrainState, run: Run, stage: str, images: TrainingImages, iterations: int, listen: Listener
) -> None:
    """Train from state.step to `iterations`, then write the stage's adapters and record the stage as finished.

    listen: called with the events of training.events. If it raises an exception, a checkpoint is written and the
        exception is raised again; this is how a user cancels.
    Raises DivergedError, naming loss and step, if a loss is not finite; the last checkpoint is kept. Raises
    StorageError if a file cannot be written.
    """
    # On a CPU, threads that prefetch batches or write checkpoints would slow training down.
    in_threads = state.device.type != "cpu"
    state.stage = stage
    with CheckpointWriter(background=in_threads) as writer:
        _iterate_to(state, run, stage, images, iterations, listen, writer, prefetch=in_threads)
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
    prefetch: bool,
) -> None:
    settings, rates = state.settings, full_rates(state)
    pending: list[tuple[int, Mapping[str, Tensor]]] = []
    steps = range(state.step, iterations)
    for batch in batches(images, steps, state.random["data"], state.device, prefetch=prefetch):
        set_rates(state, rates, decay(settings.lr_decay, state.step, iterations))
        losses = iterate(state, batch)
        state.step += 1
        pending.append((state.step, losses))
        last = state.step == iterations
        try:
            listen(StepDone(stage, state.step, iterations, losses))
            if last or state.step % settings.log_every == 0:
                listen(LossesLogged(stage, _log(run, stage, pending)))
            if settings.preview_every and (last or state.step % settings.preview_every == 0):
                listen(PreviewReady(stage, state.step, preview(state)))
        except DivergedError:
            raise
        except BaseException:
            _save(state, run, stage, pending, writer)
            raise
        if last or state.step % settings.checkpoint_every == 0:
            rows = _save(state, run, stage, pending, writer)
            if rows:
                listen(LossesLogged(stage, rows))
            listen(CheckpointSaved(stage, state.step, run.path(stage, CHECKPOINT)))


def preview(state: TrainState) -> Tensor:
    """One-step samples of the current student, (4, 3, S, S) in [-1, 1]. Prompt and seeds are the same in every call."""
    settings = state.settings
    prompt = caption(TEMPLATES[0], settings.placeholder, settings.class_noun)
    size = settings.resolution or state.family.architecture.resolution
    return one_step_images(state, [prompt] * PREVIEW_IMAGES, settings.seed, size)


def adapters_of(state: TrainState, stage: str, iterations: int) -> dict[str, Adapter]:
    """Role -> adapter with the current trained values. iterations: the number that the metadata record."""
    architecture, result = state.family.architecture, {}
    for role, weights in state.trainables.weights.items():
        names = layout.unet_names(weights.base, architecture)
        factors = {names[n]: pair for n, pair in weights.factors().items()}
        result[role] = Adapter(
            token_embeddings=state.trainables.token_embeddings[role].detach().float().cpu(),
            deltas={} if factors else {names[n]: d for n, d in weights.deltas().items()},
            factors=factors,
            metadata=run_metadata(state.family, role, affecting_result(state.settings), stage, iterations),
        )
    return result


def _log(run: Run, stage: str, pending: list[tuple[int, Mapping[str, Tensor]]]) -> tuple[Mapping[str, float], ...]:
    """Copy pending losses from the device, check them, append them to the log, and return them as rows.

    Clears `pending`. Raises DivergedError for a loss that is not finite.
    """
    rows = []
    values = iter(_to_floats([value for _, losses in pending for value in losses.values()]))
    for step, losses in pending:
        row = dict(zip(losses, values, strict=False))
        for name, value in row.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {step} of the stage {stage}, so training stopped; the last good "
                    "checkpoint is kept. Lower the learning rates or that loss's weight, and train into a new folder."
                )
        rows.append({"step": step, **row})
    if rows:
        run.log(stage, tuple(rows))
    # After writing, so that the rows of a failed write are written by the next call.
    pending.clear()
    return tuple(rows)


def _to_floats(values: Sequence[Tensor]) -> list[float]:
    """The values of one-element tensors. They are copied from the device together, which waits for it only once."""
    numbers: list[float] = torch.stack([value.detach().reshape(()) for value in values]).tolist() if values else []
    return numbers


def _save(
    state: TrainState,
    run: Run,
    stage: str,
    pending: list[tuple[int, Mapping[str, Tensor]]],
    writer: CheckpointWriter,
) -> tuple[Mapping[str, float], ...]:
    """Write pending losses, then a checkpoint. Returns the rows.

    A loss that is not finite raises DivergedError first, so that the checkpoint before the divergence is kept.
    """
    rows = _log(run, stage, pending)
    writer.save(run.path(stage, CHECKPOINT), state, run.fingerprint(stage))
    return rows


def _finish(state: TrainState, run: Run, stage: str, iterations: int) -> None:
    adapters = adapters_of(state, stage, iterations)
    for role, adapter in adapters.items():
        write_adapter(run.path(stage, f"{role}.safetensors"), adapter, state.family.architecture)
    losses = latest(run.read_log(stage)[-loss_schedule(state.settings).period :])
    run.finish(stage, {"iterations": iterations, "roles": list(adapters), "losses": losses})
