"""An iteration never makes the host wait for the GPU, tested on the meta device, whose tensors cannot be read."""

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.random_models import RandomModels
from echodistill_core.devices import to_device
from echodistill_core.diffusion import NoiseSchedule
from echodistill_core.losses import ms_swd
from echodistill_core.training import build
from echodistill_core.training.steps import iterate
from echodistill_core.training.trainable import TrainedWeights

META = torch.device("meta")


class BlockingTransfers(TorchDispatchMode):
    """Records transfers between devices other than by devices.to_device. On a GPU each would block the host."""

    def __init__(self):
        super().__init__()
        self.transfers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({t.device.type for t in tree_iter(x) if isinstance(t, torch.Tensor)} for x in (args, out))
        if before and after and before != after and not _within("to_device"):
            self.transfers.append((func.name(), before, after))
        return out


def _within(name):
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


@pytest.fixture
def on_meta(monkeypatch):
    """Models on the meta device. Operations without a kernel there, and device checks, are replaced."""
    install, adamw = TrainedWeights.install, torch.optim.AdamW

    def moved(self, device, dtype):
        self.parameters = {n: torch.nn.Parameter(p.detach().to(device)) for n, p in self.parameters.items()}
        install(self, device, dtype)

    monkeypatch.setattr(TrainedWeights, "install", moved)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(build, "pick_device", torch.device)
    monkeypatch.setattr(build, "computes_bf16", lambda device: True)
    monkeypatch.setattr(ms_swd, "sorted_last", lambda x: tuple(x.sort(dim=-1)))
    monkeypatch.setattr(ms_swd, "sorted_values", lambda x: x.sort(dim=-1).values)
    models = RandomModels("tiny", torch.device("cpu"))
    models.device = META
    return models


@pytest.mark.parametrize("options", [{}, {"preset": "tuned"}, {"augment": False, "share_text_encoder": False}])
def test_two_iterations_neither_block_nor_read_back(on_meta, options):
    state = on_meta.state(on_meta.settings(precision="bf16", **options))
    state.unconditional(1)  # encoded once per run, outside the iterations
    for denoiser in (state.family.student, state.family.teacher):
        denoiser.schedule.table(META)
    recorder = BlockingTransfers()
    for state.step in range(2):
        batch = on_meta.batch(state.settings, state.random.generators["data"], state.step)
        with recorder:
            losses = iterate(state, batch)
        assert {"recon_teacher", "mse", "grad_norm_student"} <= set(losses)
        assert all(loss.device == META for loss in losses.values())
    assert recorder.transfers == []


def test_a_blocking_transfer_is_recorded():
    recorder = BlockingTransfers()
    with recorder:
        torch.ones(2).to(META)
    assert recorder.transfers == [("aten::_to_copy", {"cpu"}, {"meta"})]
    with recorder, pytest.raises(RuntimeError):
        torch.ones(2, device=META).sum().item()


def test_a_transfer_to_a_gpu_is_pinned_and_non_blocking(monkeypatch):
    source, pinned = torch.ones(2), torch.ones(2)
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append(x) or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **options: calls.append((x, device.type, options)))
    to_device(source, torch.device("cuda"))
    assert calls[0] is source
    assert calls[1][0] is pinned
    assert calls[1][1:] == ("cuda", {"non_blocking": True})
    calls.clear()
    to_device(source, torch.device("mps"))  # MPS may read the source after it was freed, so this copy blocks
    assert [entry[1:] for entry in calls] == [("mps", {})]


def test_a_schedule_is_copied_to_a_device_once():
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10), "epsilon")
    assert schedule.table(torch.device("cpu")) is schedule.alphas_cumprod
    assert schedule.table(META) is schedule.table(META)
    assert schedule.table(META).shape == (10,)
