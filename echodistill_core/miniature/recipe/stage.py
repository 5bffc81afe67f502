"""The training loop of the recipe's stages, with checkpoints and resuming.

All random values of a step are a function of the stage's seed and the step's number, so resuming is exact.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...devices import computes_bf16
from ...files import replacing

WARMUP = 100
CHECKPOINT_SECONDS = 60.0
REPORT_SECONDS = 30.0
Losses = Mapping[str, Tensor]
Step = Callable[[int, torch.Generator], Losses]


def adam(modules: Iterable[nn.Module], lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW on all parameters of the modules that require gradients."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of this step, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the device is faster with it; the rounding is small against the gradient noise."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_bf16(device))


def train(
    path: Path,
    module: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Step,
    *,
    steps: int,
    seed: int,
    ema: float = 0.99,
    others: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Train `module` in place for `steps` steps and return its exponential moving average, in evaluation mode.

    path: checkpoint file, written every minute and at the end, from which the stage resumes.
    ema: decay of the average; short, since the learning rate decays to zero and a long average would lag.
    step: makes one optimizer step (`optimizer_step`) from its number and generator, and returns the losses to report.
        The loop sets the learning rates: linear warm-up over 100 steps, then cosine decay to zero.
    others: other trained modules, for the checkpoint.
    """
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
    kept: dict[str, nn.Module] = {"module": module, "average": average, **(others or {})}
    rates = {name: [g["lr"] for g in optimizer.param_groups] for name, optimizer in optimizers.items()}
    start = _load(path, kept, optimizers) if path.is_file() else 0
    began = reported = saved = time.monotonic()
    for number in range(start, steps):
        for name, optimizer in optimizers.items():
            for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
                group["lr"] = rate * schedule(number, steps)
        losses = step(number, step_generator(seed, number))
        average.update_parameters(module)
        now = time.monotonic()
        if now - reported > REPORT_SECONDS or number + 1 == steps:
            reported = now
            pace = (now - began) / (number + 1 - start)
            text = "  ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
            left = f"{pace:.2f} s a step, {pace * (steps - number - 1) / 60:.1f} min left"
            log_progress(f"{path.stem} {number + 1}/{steps}  {text}  {left}")
        if now - saved > CHECKPOINT_SECONDS or number + 1 == steps:
            saved = now
            _save(path, kept, optimizers, number + 1)
    return average.module.eval().requires_grad_(False)


def optimizer_step(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float = 1.0) -> None:
    """One optimizer step on the loss, with gradient-norm clipping."""
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def schedule(number: int, steps: int) -> float:
    """Learning-rate factor of this step: linear warm-up over WARMUP steps, then cosine decay to 0."""
    return min((number + 1) / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * number / steps))


def _save(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "modules": {name: m.state_dict() for name, m in modules.items()},
        "optimizers": {name: o.state_dict() for name, o in optimizers.items()},
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _load(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    return int(state["step"])


def log_progress(text: str) -> None:
    """Print a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
