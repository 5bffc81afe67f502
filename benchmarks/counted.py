"""Memory and operations of a full-size training step, counted without computing it.

Networks and steps are the package's own, on tensors that have shape, type and a storage, but no numbers (torch's
FakeTensorMode): so a machine without a GPU tells what a GPU's allocator would be asked for. Not in it: what cuDNN and
cuBLAS take to work in, fragmentation, and CUDA's own context. Reading a number back raises an error, as there is none,
so that steps which run here make no host wait for its GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from echodistill_core.concept.images import ImageSet
from echodistill_core.devices import DTYPES
from echodistill_core.diffusion import NoiseSchedule
from echodistill_core.losses import ms_swd
from echodistill_core.models.architectures import Architecture
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.models.family import Denoiser, Family
from echodistill_core.models.text import TextEncoder, clip_tokenizer
from echodistill_core.perception.backbones import SPECS, TINY_SPECS, new_backbone
from echodistill_core.settings import TrainSettings
from echodistill_core.training import build, offload
from echodistill_core.training.batches import Batch, TrainingImages
from echodistill_core.training.schedule import loss_schedule
from echodistill_core.training.state import TrainState
from echodistill_core.training.steps import critic_step, student_step, teacher_step

from . import random_checkpoint as rc
from .measure import counting

BLOCK = 512  # bytes; CUDA's allocator rounds up to them


@dataclass(frozen=True)
class Counted:
    """Of an iteration, by step.

    weights: bytes before the first iteration. peak: bytes at the most once the optimisers' moments are there, in the
    critics' turn. flop: floating-point operations, in the mean over a cycle of turns.
    """

    weights: int
    peak: dict[str, int]
    flop: dict[str, int]


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and at the most. Those set apart are elsewhere and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def set_apart(self, tensor: Tensor) -> None:
        """Count this tensor's storage as the host's."""
        size = self._sizes[tensor.untyped_storage()]
        self._gone(size)
        size[0] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and see what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage not in self._sizes:
            self._sizes[storage] = size = [-(-storage.nbytes() // BLOCK) * BLOCK]
            weakref.finalize(storage, self._gone, size)
            self.now += size[0]
            self.peak = max(self.peak, self.now)

    def _gone(self, size: list[int]) -> None:
        self.now -= size[0]


def count(settings: TrainSettings, scale: str = "full") -> Counted:
    """Count two iterations of these settings; resolution 0 takes the architecture's own."""
    architecture = rc.SCALES[scale]
    batch = _batch(settings, architecture)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, _as_on_a_gpu(live):
        run = _state(settings, architecture, scale)
        weights, peak = live.now, {}
        flop = dict.fromkeys(_steps(run, batch), 0)
        for run.step in range(loss_schedule(settings).period):
            for name, step in _steps(run, batch).items():
                with counting() as counter:
                    step()
                flop[name] += counter.get_total_flops() // loss_schedule(settings).period
        gc.collect()
        run.step = 0
        # Without the counter, which holds on to what it has seen.
        for name, step in _steps(run, batch).items():
            live.peak = live.now
            step()
            peak[name] = live.peak
    return Counted(weights, peak, flop)


def _steps(run: TrainState, batch: Batch) -> dict[str, Callable[[], object]]:
    made: list[Any] = []
    return {
        "teacher": lambda: teacher_step(run, batch),
        "student": lambda: made.append(student_step(run, batch)[1]),
        "critics": lambda: critic_step(run, batch, made.pop()),
    }


def _batch(settings: TrainSettings, architecture: Architecture) -> Batch:
    side = settings.resolution or architecture.resolution
    images = ImageSet(torch.zeros(5, 3, side, side, dtype=torch.uint8), tuple("12345"))
    factor = 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    return TrainingImages(images, settings, factor).draw(0, torch.Generator().manual_seed(0))


def _state(settings: TrainSettings, architecture: Architecture, scale: str) -> TrainState:
    """A state at step 0, of networks without numbers in the precision that they will have."""
    dtype = DTYPES[settings.precision]
    schedule = torch.linspace(0.99, 0.005, 1000)
    specs = SPECS if scale == "full" else TINY_SPECS
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            unets = [UNet2DConditionModel.from_config(architecture.unet) for _ in range(2)]
            vae = AutoencoderKL.from_config(architecture.vae)
            text = CLIPTextModel(CLIPTextConfig.from_dict(architecture.text_encoder))
            backbones = {r: new_backbone(specs[n]) for r, n in build.needed_backbones(settings).items()}
    finally:
        torch.set_default_dtype(torch.float32)
    student, teacher = (
        Denoiser(unet, NoiseSchedule(schedule, kind), "", "")
        for unet, kind in zip(unets, ("epsilon", "v_prediction"), strict=True)
    )
    encoder = TextEncoder(text, clip_tokenizer(architecture.pad_with_end))
    family = Family("counted", architecture, student, teacher, encoder, vae, "").freeze()
    family.loaded = {}
    family.text = family.text.with_placeholders({settings.placeholder: settings.vectors})
    run = build.new_state(family, backbones, settings)
    # Reading it asks whether the prompt has a placeholder, and there are no numbers to ask.
    run._unconditional = TextConditioning(torch.empty(1, 77, encoder.width, dtype=dtype))
    return run


@contextmanager
def _as_on_a_gpu(live: Live) -> Iterator[None]:
    """Sort in torch, keep the idle UNet apart in low mode, and change modules as tensors without numbers allow."""

    def apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    changed = nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)
                    module._parameters[name] = changed
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = change(buffer)
        return self

    on_host = offload._on_host

    def elsewhere(network: nn.Module) -> dict[str, Tensor]:
        found = on_host(network)
        for tensor in found.values():
            live.set_apart(tensor)
        return found

    with (
        mock.patch.object(nn.Module, "_apply", apply),
        mock.patch.object(offload, "_on_host", elsewhere),
        mock.patch.object(build, "ONE_MEMORY", ()),
        mock.patch.object(build, "computes_bf16", return_value=True),
        mock.patch.object(ms_swd, "sorted_last", lambda x: tuple(x.sort(dim=-1))),
        mock.patch.object(ms_swd, "sorted_values", lambda x: x.sort(dim=-1).values),
    ):
        yield
