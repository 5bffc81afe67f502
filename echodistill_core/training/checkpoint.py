"""Checkpoints: the whole training state in one safetensors file, written atomically, without pickles.

Tensors, by name:
    teacher/..., student/...           trained parameters of the UNets (Trainables.tensors)
    rows/teacher, rows/student         token embeddings (vectors, width)
    critics/...                        the critics' heads
    optimizers/PLAYER/INDEX/KEY        AdamW's state of a player's parameter number INDEX
    generators/STREAM                  state of a random generator, uint8
Metadata: format, format_version, fingerprint of the run, stage, step, param_groups (JSON), digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..logs import logger
from ..messages import shortened
from ..tensorfile import read_header, read_tensors, write_tensors
from .state import TrainState

log = logger(__name__)

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class CheckpointWriter:
    """Writes the checkpoints of a stage, one at a time. As a context manager, it waits for the last file at the end.

    background: write a copy in host memory in a thread, while training continues. For Stable Diffusion a checkpoint
        has 0.6 GB and takes 0.4 to 0.9 s to write to a fast disk; 100 iterations on a large GPU take 10 s. On a CPU,
        the thread would slow training down.
    """

    def __init__(self, *, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def save(self, path: Path, state: TrainState, fingerprint: str) -> None:
        """Write the state to `path`, or start to in the background.

        Raises as `save_checkpoint` does. In the background, StorageError of a file is raised by the next call.
        """
        if self._pool is None:
            save_checkpoint(path, state, fingerprint)
            return
        self.finish()
        snapshot = take_snapshot(state, fingerprint)
        copy = Snapshot({n: t.to("cpu", copy=True) for n, t in snapshot.tensors.items()}, snapshot.metadata)
        self._writing = self._pool.submit(_write, path, copy)

    def finish(self) -> None:
        """Wait until the file is complete on disk. Raises StorageError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def save_checkpoint(path: Path, state: TrainState, fingerprint: str) -> None:
    """Write the state to `path`, atomically. fingerprint: of the run's stage.

    Raises DivergedError if a trained tensor is not finite, and StorageError if the file cannot be written. An earlier
    file at `path` is then unchanged.
    """
    _write(path, take_snapshot(state, fingerprint))


def take_snapshot(state: TrainState, fingerprint: str) -> Snapshot:
    """The content of a checkpoint of this state. The tensors share memory with the state.

    Raises DivergedError if a trained tensor is not finite.
    """
    state.trainables.check_finite(state.step)
    tensors: dict[str, Tensor] = dict(state.trainables.tensors())
    groups = {}
    for name, optimizer in state.trainables.optimizers.items():
        content = optimizer.state_dict()
        for index, moments in content["state"].items():
            for key, value in moments.items():
                tensors[f"optimizers/{name}/{index}/{key}"] = torch.as_tensor(value)
        groups[name] = content["param_groups"]
    for name, generator in state.random.generators.items():
        tensors[f"generators/{name}"] = generator.get_state()
    metadata = {
        "format": "echodistill-checkpoint",
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "stage": state.stage,
        "step": str(state.step),
        "param_groups": json.dumps(groups, sort_keys=True),
    }
    contents = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    return Snapshot(tensors, {**metadata, "digest": _digest(metadata, contents)})


def load_checkpoint(path: Path, state: TrainState, fingerprint: str) -> None:
    """Load a checkpoint into a new state of the same run, in place: tensors, optimisers, generators, stage and step.

    fingerprint: of the run's stage.
    Raises InputError if the file is damaged, belongs to another run, or lacks a tensor of the state.
    """
    try:
        metadata, tensors = read_header(path).metadata, read_tensors(path)
    except InputError as error:
        reason = str(error).rpartition("; ")[0]
        raise InputError(f"{reason}; delete this checkpoint, and the same command starts the stage anew.") from error
    if metadata.get("format") != "echodistill-checkpoint" or metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} is no checkpoint of this version of EchoDistill; train again into a new folder.")
    if metadata.get("fingerprint") != fingerprint:
        raise InputError(
            f"{path} belongs to another run (fingerprint {shortened(metadata.get('fingerprint'))}, expected "
            f"{fingerprint}); choose the folder that it was written in."
        )
    contents = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    if metadata.pop("digest", "") != _digest(metadata, contents):
        raise InputError(
            f"{path} is damaged: its metadata were changed after it was written; restore the original file, or train "
            "again into a new folder."
        )
    trained = state.trainables.tensors()
    for name, tensor in trained.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path} has no tensor {name} of shape {tuple(tensor.shape)}; train again into a new folder."
            )
        tensor.copy_(tensors[name])
    for weights in state.trainables.weights.values():
        weights.sync_from_master()
    groups = json.loads(metadata["param_groups"])
    for name, optimizer in state.trainables.optimizers.items():
        moments = _optimizer_state(tensors, f"optimizers/{name}/")
        optimizer.load_state_dict({"state": moments, "param_groups": groups[name]})
    for name, generator in state.random.generators.items():
        generator.set_state(tensors[f"generators/{name}"].clone())
    state.stage, state.step = metadata["stage"], int(metadata["step"])


def _write(path: Path, snapshot: Snapshot) -> None:
    write_tensors(path, snapshot.tensors, snapshot.metadata)
    facts = snapshot.metadata
    log.debug(
        "checkpoint %s: stage %s, step %s, digest %s", shortened(path), facts["stage"], facts["step"], facts["digest"]
    )


def _digest(metadata: Mapping[str, str], contents: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Fingerprint of metadata, names, dtypes and shapes; it does not cover the values.

    Without it, a changed step or learning rate, or missing moments, would change the result without an error.
    """
    return hashlib.sha256(json.dumps([metadata, contents], sort_keys=True).encode()).hexdigest()[:16]


def _optimizer_state(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """Parameter index -> state of an optimiser, as its `state_dict` has under "state"."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition("/")
            # Cloned, because the tensors are views of the mapped file, which the next checkpoint replaces.
            moments.setdefault(int(index), {})[key] = tensor.clone()
    return moments
