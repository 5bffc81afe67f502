"""Memory and operations of a full-size training step, counted without computing it.

The package's own networks and steps run on tensors with shape, dtype and storage but no data (torch's FakeTensorMode).
A machine without a GPU can thus count the bytes that a step would request from CUDA's allocator. Workspaces of cuDNN
and cuBLAS, fragmentation and the CUDA context are not included. Reading a value from such a tensor raises an error, so
a step that runs here never makes the host wait for its GPU.
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
from .measure import flop_counter

BLOCK = 512  # bytes; CUDA's allocator rounds each request up to a multiple


@dataclass(frozen=True)
class CountedIteration:
    """The counted cost of an iteration.

    weights: bytes before the first iteration.
    peak: highest bytes by step, in an iteration with images and critics, when the optimisers' moments exist.
    flop: floating-point operations by step, the mean over the loss schedule's period.
    """

    weights: int
    peak: dict[str, int]
    flop: dict[str, int]


class LiveMemoryCounter(TorchDispatchMode):
    """Counts the bytes of all live storages of the device.

    current: bytes now. peak: the highest value of current; callers may reset it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def exclude(self, tensor: Tensor) -> None:
        """Stop counting this tensor's storage, as it is in host memory."""
        size = self._sizes[tensor.untyped_storage()]
        self._release(size)
        size[0] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and track the storages of its outputs."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: Any) -> None:
        if storage not in self._sizes:
            self._sizes[storage] = size = [-(-storage.nbytes() // BLOCK) * BLOCK]
            weakref.finalize(storage, self._release, size)
            self.current += size[0]
            self.peak = max(self.peak, self.current)

    def _release(self, size: list[int]) -> None:
        self.current -= size[0]


def count_iteration(settings: TrainSettings, scale: str = "full") -> CountedIteration:
    """Count the memory and operations of an iteration with these settings; resolution 0 takes the architecture's own.

    Operations are counted over one period of the loss schedule, memory in one more iteration.
    """
    architecture = rc.SCALES[scale]
    batch = _batch(settings, architecture)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemoryCounter() as live, _emulate_gpu(live):
        state = _state(settings, architecture, scale)
        weights, peak = live.current, {}
        flop = dict.fromkeys(_steps(state, batch), 0)
        for state.step in range(loss_schedule(settings).period):
            for name, step in _steps(state, batch).items():
                with flop_counter() as counter:
                    step()
                flop[name] += counter.get_total_flops() // loss_schedule(settings).period
        gc.collect()
        state.step = 0
        # Memory is measured without the FLOP counter, which keeps references to tensors.
        for name, step in _steps(state, batch).items():
            live.peak = live.current
            step()
            peak[name] = live.peak
    return CountedIteration(weights, peak, flop)


def _steps(state: TrainState, batch: Batch) -> dict[str, Callable[[], object]]:
    student_outputs: list[Any] = []
    return {
        "teacher": lambda: teacher_step(state, batch),
        "student": lambda: student_outputs.append(student_step(state, batch)[1]),
        "critics": lambda: critic_step(state, batch, student_outputs.pop()),
    }


def _batch(settings: TrainSettings, architecture: Architecture) -> Batch:
    side = settings.resolution or architecture.resolution
    images = ImageSet(torch.zeros(5, 3, side, side, dtype=torch.uint8), tuple("12345"))
    factor = 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    return TrainingImages(images, settings, factor).draw(0, torch.Generator().manual_seed(0))


def _state(settings: TrainSettings, architecture: Architecture, scale: str) -> TrainState:
    """A training state at step 0, of networks without data in the precision of the settings."""
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
    state = build.new_state(family, backbones, settings)
    # Encoding the empty prompt would search its token ids for a placeholder, and these tensors hold no ids.
    state._unconditional = TextConditioning(torch.empty(1, 77, encoder.width, dtype=dtype))
    return state


@contextmanager
def _emulate_gpu(live: LiveMemoryCounter) -> Iterator[None]:
    """Make the package treat the device as a GPU.

    Sorting uses torch, and the UNet that is offloaded in low memory mode does not count. nn.Module._apply replaces
    parameters instead of their data, because tensors without data do not support the latter.
    """

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

    def excluded_on_host(network: nn.Module) -> dict[str, Tensor]:
        tensors = on_host(network)
        for tensor in tensors.values():
            live.exclude(tensor)
        return tensors

    with (
        mock.patch.object(nn.Module, "_apply", apply),
        mock.patch.object(offload, "_on_host", excluded_on_host),
        mock.patch.object(build, "ONE_MEMORY", ()),
        mock.patch.object(build, "computes_bf16", return_value=True),
        mock.patch.object(ms_swd, "sorted_last", lambda x: tuple(x.sort(dim=-1))),
        mock.patch.object(ms_swd, "sorted_values", lambda x: x.sort(dim=-1).values),
    ):
        yield
