"""Checkpoints: everything that changes while a run trains, in one safetensors file, written atomically, no pickles."""

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
from ..messages import shortened
from ..tensorfile import read_header, read_tensors, write_tensors
from .state import TrainState

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint file of one moment holds."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class CheckpointWriter:
    """Writes the checkpoints of a stage, one at a time.

    behind: write in a thread while training goes on, from a copy in the host's memory. At Stable Diffusion's size a
        checkpoint has 0.6 GB, which takes 0.4 to 0.9 s to reach a fast disk; 100 iterations on a large GPU take 10 s.
        On a CPU the thread would take its time from training.
    As a context manager it waits at the end for the last file.
    """

    def __init__(self, *, behind: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if behind else None
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
        """Write the state, or begin to. Raises as `save_checkpoint` does, for the one before this as well."""
        if self._pool is None:
            save_checkpoint(path, state, fingerprint)
            return
        self.finish()
        snapshot = take_snapshot(state, fingerprint)
        copy = Snapshot({n: t.to("cpu", copy=True) for n, t in snapshot.tensors.items()}, snapshot.metadata)
        self._writing = self._pool.submit(_write, path, copy)

    def finish(self) -> None:
        """Wait until the file is whole on disk. Raises StorageError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def save_checkpoint(path: Path, state: TrainState, fingerprint: str) -> None:
    """Write the state after its last iteration. An earlier file at `path` is replaced only by a whole new one.

    Raises DivergedError, and keeps the earlier file, where a trained tensor is not finite; StorageError where it cannot
    be written.
    """
    _write(path, take_snapshot(state, fingerprint))


def take_snapshot(state: TrainState, fingerprint: str) -> Snapshot:
    """The state's own tensors, by a checkpoint's names, and what is said of them.

    Raises DivergedError where a trained tensor is not finite.
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
    """Bring a freshly made state to where the checkpoint was written, learning rates included.

    Raises InputError where the file is damaged, of another run, or does not hold what this state needs.
    """
    metadata = read_header(path).metadata
    if metadata.get("format") != "echodistill-checkpoint" or metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} is no checkpoint of this version of EchoDistill; train again into a new folder.")
    if metadata.get("fingerprint") != fingerprint:
        raise InputError(
            f"{path} belongs to another run (fingerprint {shortened(metadata.get('fingerprint'))}, expected "
            f"{fingerprint}); choose the folder that it was written in."
        )
    tensors = read_tensors(path)
    contents = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    if metadata.pop("digest", "") != _digest(metadata, contents):
        raise InputError(
            f"{path} is damaged: what it says of its contents was changed after it was written; give it back as it "
            "was, or train again into a new folder."
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
        optimizer.load_state_dict({"state": _moments(tensors, f"optimizers/{name}/"), "param_groups": groups[name]})
    for name, generator in state.random.generators.items():
        generator.set_state(tensors[f"generators/{name}"].clone())
    state.stage, state.step = metadata["stage"], int(metadata["step"])


def _write(path: Path, snapshot: Snapshot) -> None:
    write_tensors(path, snapshot.tensors, snapshot.metadata)


def _digest(metadata: Mapping[str, str], contents: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Of everything but the tensors' values: a changed step or learning rate, or moments that are gone, would else
    train on to another result without a word.
    """
    return hashlib.sha256(json.dumps([metadata, contents], sort_keys=True).encode()).hexdigest()[:16]


def _moments(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition("/")
            # The file may be replaced while these are in use, so they must not stay views of it.
            moments.setdefault(int(index), {})[key] = tensor.clone()
    return moments
