"""Time, memory and operations of one training iteration and its parts, against a literal implementation.

    python -m benchmarks.train_step [--scale tiny|full] [--device cpu|cuda] [--modes paper ...] [--out FILE.json]
    python -m benchmarks.train_step --alternate 20      all versions in alternation, for a machine with other load

The literal implementation ("plain", benchmarks/literal.py: float32, eager, nothing cached) and every mode run one after
the other in this process. On a GPU the modes use bf16 unless --precision is given. With --out an interrupted run
continues.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echodistill_core.devices import DTYPES
from echodistill_core.diffusion import timesteps_like
from echodistill_core.errors import EchoDistillError
from echodistill_core.losses.ms_swd import ms_swd
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.settings import PRESETS, TrainSettings
from echodistill_core.training.batches import batches
from echodistill_core.training.schedule import loss_schedule
from echodistill_core.training.state import TrainState
from echodistill_core.training.steps import extract_features, iterate

from .measure import (
    WARM_UP,
    Cost,
    Figures,
    Work,
    argument_parser,
    cost,
    device_name,
    matmul_throughput,
    table,
)
from .random_models import RandomModels

PLAIN = "plain"  # the literal implementation, in figure files and tables
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tuned": {"preset": "tuned"},
    "low": {"memory_mode": "low"},
}


def mode_settings() -> dict[str, dict[str, Any]]:
    """The settings of each mode, presets expanded. Figure files store them, so a changed preset needs a new file."""
    return {mode: {**PRESETS[options.get("preset", "paper")], **options} for mode, options in MODES.items()}


def iteration(state: TrainState, models: RandomModels) -> Work:
    """A function that draws the next batch and runs the next iteration. On a GPU a thread prefetches the batches."""
    images, generator = models.training_images(state.settings), state.random["data"]
    prefetch = state.device.type != "cpu"
    source = batches(images, range(state.step, sys.maxsize), generator, state.device, prefetch=prefetch)

    def work() -> None:
        iterate(state, next(source))
        state.step += 1

    return work


def _forward_backward(compute: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Work:
    def work() -> None:
        compute().sum().backward(inputs=inputs)
        for tensor in inputs:
            tensor.grad = None

    return work


def _forward_only(compute: Callable[[], object]) -> Work:
    def work() -> None:
        with torch.no_grad():
            compute()

    return work


def _optimizer_steps(state: TrainState) -> Work:
    def work() -> None:
        for optimizer in state.trainables.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work


# Printed names of parts; figure files keep the shorter ones.
PART_LABELS = {
    "decode of it": "decode teacher target",
    "identity of it": "identity features of teacher target",
}


def parts(state: TrainState, models: RandomModels) -> dict[str, Work]:
    """The parts of an iteration, each with its own backward pass, by their names in figure files.

    Their sum is about the whole iteration, if the iteration computes image losses and memory_mode is normal. In low
    memory mode the student's pass and the decoder's layers run twice.
    """
    s, family, student = state.settings, state.family, state.family.student
    batch = models.batch(s, torch.Generator().manual_seed(0))
    assert family.teacher is not None
    teacher, trainables = family.teacher, state.trainables
    with torch.no_grad():
        z = family.encode(batch.pixels)
        text = state.condition(batch.prompts, "student")
        guidance_text = TextConditioning.cat([state.unconditional(len(z)), text])
    t = timesteps_like(student.schedule.timesteps - 1, z)
    weights = {role: list(trained.working.values()) for role, trained in trainables.weights.items()}
    images = batch.real.clone().requires_grad_()
    latents = z.clone().requires_grad_()

    def swd() -> Tensor:
        noise = state.random["noise"]
        return ms_swd(images, batch.pixels.flip(0), noise, levels=s.swd_levels, projections=s.swd_projections)

    works: dict[str, Work] = {
        "batch": lambda: models.batch(s, state.random["data"]),
        "text": _forward_backward(
            lambda: state.condition(batch.prompts, "teacher").features, [trainables.token_embeddings["teacher"]]
        ),
        "encode": _forward_only(lambda: family.encode(batch.pixels)),
        "teacher": _forward_backward(lambda: teacher.predict(z, t, text), weights["teacher"]),
        "student": _forward_backward(lambda: student.predict(z, t, text), weights["student"]),
        "decode": _forward_backward(lambda: family.decode(latents), [latents]),
        "guided teacher": _forward_only(lambda: teacher.predict(z.repeat(2, 1, 1, 1), t.repeat(2), guidance_text)),
        "decode of it": _forward_only(lambda: family.decode(z)),
        "identity of it": _forward_only(lambda: extract_features(state, "clip", batch.real)),
        "MS-SWD": _forward_backward(swd, [images]),
    }
    for role in s.critic_weights:
        works[f"{role} critic"] = _forward_backward(partial(extract_features, state, role, images), [images])
        works[f"{role} of photographs"] = _forward_only(partial(extract_features, state, role, batch.real))
    works["optimisers"] = _optimizer_steps(state)
    return works


def measure(models: RandomModels, figures: Figures, modes: Sequence[str], precision: str) -> None:
    """Measure matrix throughput, the literal implementation and every mode, unless they are in the figures."""
    for name in {"fp32", precision}:
        figures.cell(f"ceiling {name}", partial(matmul_throughput, models.device, DTYPES[name]))
    figures.cell(PLAIN, lambda: _literal_cost(models))
    for mode in modes:
        figures.cell(mode, partial(_mode_cost, models, models.settings(precision=precision, **MODES[mode])))


def _mode_cost(models: RandomModels, settings: TrainSettings) -> dict[str, Any]:
    """The cost of an iteration and of its parts. The state is freed on return, so the next peak does not include it."""
    _free()
    state = models.state(settings)
    period, count = _period(state, models)
    whole = cost(period, models.device).per_iteration(count)
    by_part = {name: asdict(cost(work, models.device)) for name, work in parts(state, models).items()}
    return {**asdict(whole), "parts": by_part}


def _period(state: TrainState, models: RandomModels) -> tuple[Work, int]:
    """One period of the loss schedule (images and critics), and the number of its iterations."""
    work, count = iteration(state, models), loss_schedule(state.settings).period

    def period() -> None:
        for _ in range(count):
            work()

    return period, count


def _literal_cost(models: RandomModels) -> Cost:
    work = _literal_iteration(models)
    _free()
    return cost(work, models.device)


def _literal_iteration(models: RandomModels) -> Work:
    settings = models.settings()
    literal = models.literal(settings)
    return lambda: literal.iterate(models.batch(settings, literal.data_generator))


def alternate(models: RandomModels, modes: Sequence[str], precision: str, rounds: int) -> str:
    """Time iterations of the literal implementation and the modes in alternation. Returns a table.

    All versions thus see the same load from other programs.
    """
    works: dict[str, tuple[Work, int]] = {PLAIN: (_literal_iteration(models), 1)}
    for mode in modes:
        works[mode] = _period(models.state(models.settings(precision=precision, **MODES[mode])), models)
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(WARM_UP + rounds):
        for name, (work, count) in works.items():
            seconds = cost(work, models.device, 0, 1).seconds / count
            if i >= WARM_UP:
                times[name].append(seconds)
    plain = times[PLAIN]
    rows = [
        [
            name,
            f"{statistics.median(own) * 1e3:.1f}",
            f"{min(own) * 1e3:.1f}",
            f"{statistics.median(a / b for a, b in zip(plain, own, strict=True)):.2f}",
            f"{min(plain) / min(own):.2f}",
        ]
        for name, own in times.items()
    ]
    return table([f"{rounds} rounds", "median ms", "fastest ms", "speed-up", "speed-up of fastest"], rows)


def report(figures: Figures, modes: Sequence[str], precision: str) -> str:
    """Two tables: the modes against the literal implementation, and the parts of each mode."""
    cells = figures.record["cells"]
    rows = []
    for mode in (PLAIN, *modes):
        cell = cells[mode]
        throughput = cells["ceiling fp32" if mode == PLAIN else f"ceiling {precision}"]
        rows.append(
            [
                mode,
                f"{cell['seconds'] * 1e3:.1f}",
                f"{cell['fastest'] * 1e3:.1f}-{cell['slowest'] * 1e3:.1f}",
                f"{cells[PLAIN]['seconds'] / cell['seconds']:.2f}",
                "-" if cell["peak"] is None else f"{cell['peak'] / 2**30:.2f}",
                f"{cell['flop'] / 1e12:.3f}",
                f"{cell['flop'] / cell['seconds'] / throughput:.0%}",
            ]
        )
    iterations = table(["iteration", "ms", "range", "speed-up", "peak GiB", "TFLOP", "of matmul peak"], rows)
    by_part = table(
        ["part, ms", *modes],
        [
            [PART_LABELS.get(name, name), *(f"{cells[mode]['parts'][name]['seconds'] * 1e3:.1f}" for mode in modes)]
            for name in cells[modes[0]]["parts"]
        ],
    )
    return f"{iterations}\n\n{by_part}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argument_parser("benchmarks.train_step", __doc__)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="training modes")
    parser.add_argument("--precision", choices=list(DTYPES), help="of the modes; default: bf16 on a GPU, else fp32")
    parser.add_argument("--resolution", type=int, default=0, help="side in pixels; 0 takes the family's own")
    parser.add_argument(
        "--alternate",
        type=int,
        default=0,
        metavar="N",
        help="time N rounds of all versions in alternation; no file is written",
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    if options.alternate:
        models = RandomModels(options.scale, device, options.resolution)
        print(alternate(models, options.modes, precision, options.alternate))
        return 0
    try:
        settings: dict[str, Any] = {"scale": options.scale, "resolution": options.resolution, "precision": precision}
        settings["modes"] = mode_settings()
        figures = Figures(options.out, "train_step", device, settings)
        measure(RandomModels(options.scale, device, options.resolution), figures, options.modes, precision)
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {options.scale} scale, {precision}, {figures.record['date']}")
    print(report(figures, options.modes, precision))
    return 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
