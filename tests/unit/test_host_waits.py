"""No iteration makes the host wait for its GPU: tested on a device whose values cannot be read."""

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.workbench import Workbench
from echodistill_core.devices import to_device
from echodistill_core.diffusion import NoiseSchedule
from echodistill_core.losses import ms_swd
from echodistill_core.training import build
from echodistill_core.training.steps import iterate
from echodistill_core.training.trainable import TrainedWeights

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Records transfers between devices outside of devices.to_device: the host waits for a GPU there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({t.device.type for t in tree_iter(x) if isinstance(t, torch.Tensor)} for x in (args, out))
        if before and after and before != after and not _within("to_device"):
            self.found.append((func.name(), before, after))
        return out


def _within(name):
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


@pytest.fixture
def on_meta(monkeypatch):
    """Let the package train on the device of the test, with replacements for operations that it lacks."""
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
    bench = Workbench("tiny", torch.device("cpu"))
    bench.device = META
    return bench


@pytest.mark.parametrize("options", [{}, {"preset": "tuned"}, {"augment": False, "share_text_encoder": False}])
def test_two_iterations_send_without_waiting_and_read_nothing_back(on_meta, options):
    state = on_meta.state(on_meta.settings(precision="bf16", **options))
    state.unconditional(1)  # once a run
    for denoiser in (state.family.student, state.family.teacher):
        denoiser.schedule.table(META)
    seen = Crossings()
    for state.step in range(2):
        batch = on_meta.batch(state.settings, state.random.generators["data"], state.step)
        with seen:
            losses = iterate(state, batch)
        assert {"recon_teacher", "mse", "grad_norm_student"} <= set(losses)
        assert all(loss.device == META for loss in losses.values())
    assert seen.found == []


def test_a_transfer_to_the_host_is_detected():
    seen = Crossings()
    with seen:
        torch.ones(2).to(META)
    assert seen.found == [("aten::_to_copy", {"cpu"}, {"meta"})]
    with seen, pytest.raises(RuntimeError):
        torch.ones(2, device=META).sum().item()


def test_transfers_to_a_gpu_are_page_locked_and_asynchronous(monkeypatch):
    given, pinned = torch.ones(2), torch.ones(2)
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append(x) or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: seen.append((x, device.type, how)))
    to_device(given, torch.device("cuda"))
    assert seen[0] is given
    assert seen[1][0] is pinned
    assert seen[1][1:] == ("cuda", {"non_blocking": True})
    seen.clear()
    to_device(given, torch.device("mps"))  # whose copy may be read after its source is gone
    assert [entry[1:] for entry in seen] == [("mps", {})]


def test_a_schedule_is_sent_to_a_device_once():
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10), "epsilon")
    assert schedule.table(torch.device("cpu")) is schedule.alphas_cumprod
    assert schedule.table(META) is schedule.table(META)
    assert schedule.table(META).shape == (10,)
