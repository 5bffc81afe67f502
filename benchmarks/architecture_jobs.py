"""The jobs of the full-architecture benchmark. Each runs in its own process, so that memory is measured per job."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import Adapter, read_adapter, run_metadata, write_adapter
from echodistill_core.errors import EchoDistillError
from echodistill_core.models import layout
from echodistill_core.models.architectures import TINY
from echodistill_core.models.family import Family
from echodistill_core.models.load import load_family
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.sampling import sample
from echodistill_core.settings import TrainSettings

from . import random_checkpoint as rc
from .machine import Memory, memory

T = TypeVar("T")
Hashes = dict[str, str]


def run_isolated(isolated: bool, job: Callable[..., T], *arguments: Any) -> T:
    """Run a job in a new process and return its result. isolated: False runs it in this process, for tests.

    Raises EchoDistillError if the process is killed, usually because memory ran out.
    """
    if not isolated:
        return job(*arguments)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(job, *arguments).result()
    except BrokenProcessPool as error:
        raise EchoDistillError(
            f"the process of {job.__name__} was killed, probably because memory ran out; expected about 12 GB of free "
            "memory: close other programs or use --scale tiny."
        ) from error


def write(folder: str, file: str, role: str, scale: str, dtype: str) -> dict[str, Any]:
    """Job: write one checkpoint in both layouts. Returns its hashes and the number of parameters of each network."""
    architecture = rc.SCALES[scale]
    networks = rc.random_checkpoint(role, architecture, rc.DTYPES[dtype])
    written = rc.hashes(networks)
    numbers = {part: sum(t.numel() for t in tensors.values()) for part, tensors in networks.items()}
    rc.write_folder(Path(folder), role, networks, architecture)
    numbers.update(rc.write_file(Path(file), role, networks, architecture))
    return {"hashes": written, "numbers": numbers}


def load(sources: Mapping[str, str], predictions: Mapping[str, str]) -> dict[str, Any]:
    """Job: load a teacher, a student or both. Returns time, memory, hashes, prediction types, layers and warnings.

    sources: path of a folder or file by role. predictions: prediction type or "auto" by role.
    A tiny family is loaded first, so that imports count neither as time nor as memory.
    """
    load_family(tiny_checkpoint("student"), architecture=TINY)
    before = memory()
    started = time.perf_counter()
    role = next(iter(sources)) if len(sources) == 1 else "student"
    family = load_family(
        sources[role],
        sources["teacher"] if len(sources) > 1 else None,
        student_prediction=predictions[role],
        teacher_prediction=predictions.get("teacher", "auto"),
    )
    seconds = time.perf_counter() - started
    loaded = memory()
    denoisers = {} if family.teacher is None else {"teacher": family.teacher}
    denoisers[role] = family.student
    hashes = rc.hashes(
        {f"{name}.unet": denoiser.unet.state_dict() for name, denoiser in denoisers.items()}
        | {"text_encoder": _text_tensors(family), "vae": family.vae.state_dict()}
    )
    return {
        "seconds": seconds,
        "memory": {"loaded": _growth(before, loaded), "touched": _growth(before, memory())},
        "hashes": hashes,
        "predictions": {name: denoiser.schedule.prediction_type for name, denoiser in denoisers.items()},
        "text_layers": family.text.model.config.num_hidden_layers,
        "warnings": family.warnings,
    }


def convert(file: str, folder: str, dtype: str) -> Hashes:
    """Job: convert a single file by diffusers, with a folder's configurations. Returns the hashes of the result."""
    with _quiet_diffusers():
        pipeline = StableDiffusionPipeline.from_single_file(
            file, config=folder, torch_dtype=rc.DTYPES[dtype], local_files_only=True
        )
    text = {n.removeprefix("text_model."): t for n, t in pipeline.text_encoder.state_dict().items()}
    return rc.hashes({"unet": pipeline.unet.state_dict(), "text_encoder": text, "vae": pipeline.vae.state_dict()})


def adapt_and_sample(file: str, adapter_file: str) -> dict[str, Any]:
    """Job: write and read an adapter for all keys and values, apply it, and sample one 64x64 image in one step."""
    before = memory()
    family = load_family(file)
    unet = {n: t for n, t in family.student.unet.state_dict().items() if ".attn2.to_k." in n or ".attn2.to_v." in n}
    names = layout.unet_names(unet, family.architecture)
    shapes = {names[n]: t for n, t in unet.items()}
    deltas = {n: 0.01 * t for n, t in rc.random_tensors(shapes, 4, torch.float32).items()}
    token_embeddings = family.text.noun_embeddings("dog", 1)
    settings = dataclasses.asdict(TrainSettings(class_noun="dog"))
    adapter = Adapter(
        token_embeddings, deltas, metadata=run_metadata(family, "student", settings, "distil", settings["iterations"])
    )
    path = Path(adapter_file)
    write_seconds, _ = _timed(lambda: write_adapter(path, adapter, family.architecture))
    read_seconds, read = _timed(lambda: read_adapter(path))
    mismatches = compare(_adapter_hashes(adapter), _adapter_hashes(read))
    with _quiet_diffusers():
        cast_seconds, _ = _timed(lambda: family.to("cpu", torch.float32))
    with personalised(family, [read]) as model:
        sample_seconds, image = _timed(lambda: sample(model, ["photo of a <new1> dog"], height=64, width=64))
    return {
        "adapter": {
            "matrices": len(deltas),
            "numbers": sum(delta.numel() for delta in deltas.values()),
            "bytes": path.stat().st_size,
            "write_seconds": write_seconds,
            "read_seconds": read_seconds,
            "mismatches": mismatches,
        },
        "sample": {
            "cast_to_fp32_seconds": cast_seconds,
            "seconds": sample_seconds,
            "shape": list(image.shape),
            "finite": bool(image.isfinite().all()),
            "deviation": float(image.std()),
            "memory": _growth(before, memory()),
        },
    }


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Suppress diffusers' progress bar and its warnings about safety checkers and casting."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        diffusers_logging.enable_progress_bar()


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def _text_tensors(family: Family) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in family.text.model.state_dict().items()}


def _adapter_hashes(adapter: Adapter) -> Hashes:
    return rc.hashes({"adapter": {**adapter.deltas, "rows": adapter.token_embeddings}})


def _growth(before: Memory, after: Memory) -> dict[str, int | None]:
    """Bytes above the resident memory before: the peak, and the memory that no file backs. None where unknown."""
    peak = None if after.peak is None or before.now is None else after.peak - before.now
    anonymous = None
    if after.anonymous is not None and before.anonymous is not None:
        anonymous = after.anonymous - before.anonymous
    return {"peak": peak, "anonymous": anonymous}


def compare(expected: Hashes, actual: Hashes) -> list[str]:
    """The sorted names that only one side has, or whose hashes differ."""
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
