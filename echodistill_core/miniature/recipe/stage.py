"""One training of the recipe: a loop that checkpoints and resumes.

Everything random in a step is a function of the stage's seed and the step's number, so an interrupted stage goes on as
if nothing had happened.
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
    """AdamW on all parameters of the modules that take gradients."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything random in this step, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def precision(device: torch.device) -> torch.autocast:
    """Matrices in bfloat16 where that is twice as fast; the recipe's noise is far larger than its rounding."""
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
    ema: decay of the average. Rates that fall to zero average by themselves; a long memory would only lag behind.
    step: makes one step of the optimizers (`optimizer_step`) given its number and generator, and returns the losses to report.
        The loop sets their learning rates, which rise for 100 steps and fall to zero along a cosine.
    others: further modules that change, for the checkpoint.
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
    """One step of the optimizer down the loss, with the gradient's norm limited."""
    optimizer.zero_grad(set_to_none=True)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def schedule(number: int, steps: int) -> float:
    """Share of the learning rate at this step: linear rise over WARMUP steps, then a cosine to 0."""
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
