"""What does one iteration of training cost, whole and by its parts, against the method read literally?

    python -m benchmarks.train_step [--scale tiny|full] [--device cpu|cuda] [--modes paper ...] [--out FILE.json]
    python -m benchmarks.train_step --alternate 20      plain and the modes in turns, for a machine with neighbours

The plain version (benchmarks/plain: float32, eager, nothing reused) and every mode run one after the other in this
process; the modes in bf16 on a GPU, unless --precision says otherwise. With --out an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
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

from .measure import WARM_UP, Cost, Figures, Work, cost, device_name, matrix_ceiling, table
from .workbench import Workbench

PLAIN = "plain"
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tuned": {"preset": "tuned"},
    "low": {"memory_mode": "low"},
}
_ENDLESS = 10**9  # iterations; no run is measured for so long


def meaning() -> dict[str, dict[str, Any]]:
    """What each mode sets, its preset spelt out: figures of a preset of before are none of today's."""
    return {mode: {**PRESETS[options.get("preset", "paper")], **options} for mode, options in MODES.items()}


def iteration(state: TrainState, bench: Workbench) -> Work:
    """The next iteration with its batch, drawn as the loop has it: in a thread, where there is a GPU."""
    images, generator = bench.training_images(state.settings), state.random["data"]
    prefetch = state.device.type != "cpu"
    drawn = batches(images, range(state.step, _ENDLESS), generator, state.device, prefetch=prefetch)

    def work() -> None:
        iterate(state, next(drawn))
        state.step += 1

    return work


def parts(state: TrainState, bench: Workbench) -> dict[str, Work]:
    """The pieces of an iteration, each by itself with its backward pass; their sum is about the whole, where an
    iteration compares images and memory_mode is normal: low makes the student's pass and the decoder's layers twice.
    """
    s, family, student = state.settings, state.family, state.family.student
    batch = bench.batch(s, torch.Generator().manual_seed(0))
    assert family.teacher is not None
    teacher = family.teacher
    with torch.no_grad():
        z = family.encode(batch.pixels)
        text = state.condition(batch.prompts, "student")
        both = TextConditioning.cat([state.unconditional(len(z)), text])
    t = timesteps_like(student.schedule.timesteps - 1, z)

    def back(made: Callable[[], Tensor], to: Sequence[Tensor]) -> Work:
        def work() -> None:
            made().sum().backward(inputs=to)
            for tensor in to:
                tensor.grad = None

        return work

    def silent(made: Callable[[], object]) -> Work:
        def work() -> None:
            with torch.no_grad():
                made()

        return work

    images = batch.real.clone().requires_grad_()
    latents = z.clone().requires_grad_()
    found: dict[str, Work] = {
        "batch": lambda: bench.batch(s, state.random["data"]),
        "text": back(
            lambda: state.condition(batch.prompts, "teacher").features, [state.trainables.token_embeddings["teacher"]]
        ),
        "encode": silent(lambda: family.encode(batch.pixels)),
        "teacher": back(
            lambda: teacher.predict(z, t, text), list(state.trainables.weights["teacher"].working.values())
        ),
        "student": back(
            lambda: student.predict(z, t, text), list(state.trainables.weights["student"].working.values())
        ),
        "decode": back(lambda: family.decode(latents), [latents]),
        "guided teacher": silent(lambda: teacher.predict(z.repeat(2, 1, 1, 1), t.repeat(2), both)),
        "decode of it": silent(lambda: family.decode(z)),
        "identity of it": silent(lambda: extract_features(state, "clip", batch.real)),
        "MS-SWD": back(
            lambda: ms_swd(
                images,
                batch.pixels.flip(0),
                state.random["noise"],
                levels=s.swd_levels,
                projections=s.swd_projections,
            ),
            [images],
        ),
    }
    for role in s.critic_weights:
        found[f"{role} critic"] = back(lambda role=role: extract_features(state, role, images), [images])  # type: ignore[misc]
        found[f"{role} of photographs"] = silent(lambda role=role: extract_features(state, role, batch.real))  # type: ignore[misc]

    def optimise() -> None:
        for optimizer in state.trainables.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    found["optimisers"] = optimise
    return found


def measure(bench: Workbench, figures: Figures, modes: Sequence[str], precision: str) -> None:
    """Every mode that is not in the figures yet."""
    for name in {"fp32", precision}:
        figures.cell(f"ceiling {name}", partial(matrix_ceiling, bench.device, DTYPES[name]))
    figures.cell(PLAIN, lambda: _plain(bench))
    for mode in modes:
        figures.cell(mode, partial(_mode, bench, bench.settings(precision=precision, **MODES[mode])))


def _mode(bench: Workbench, settings: TrainSettings) -> dict[str, Any]:
    """An iteration's cost, and the costs of its parts. Its state is gone when it ends, before another's peak counts."""
    _free()
    state = bench.state(settings)
    period, count = _period(state, bench)
    whole = cost(period, bench.device).each(count)
    split = {name: asdict(cost(work, bench.device)) for name, work in parts(state, bench).items()}
    return {**asdict(whole), "parts": split}


def _period(state: TrainState, bench: Workbench) -> tuple[Work, int]:
    """A whole cycle of the turns of images and critics, and how many iterations it has."""
    work, count = iteration(state, bench), loss_schedule(state.settings).period

    def period() -> None:
        for _ in range(count):
            work()

    return period, count


def _plain(bench: Workbench) -> Cost:
    settings = bench.settings()
    peer = bench.plain(settings)
    _free()
    return cost(lambda: peer.iterate(bench.batch(settings, peer.data)), bench.device)


def alternate(bench: Workbench, modes: Sequence[str], precision: str, rounds: int) -> str:
    """Time whole iterations of the plain version and the modes in turns, so that a slow minute is slow for all."""
    settings = bench.settings()
    peer = bench.plain(settings)
    works: dict[str, tuple[Work, int]] = {PLAIN: (lambda: peer.iterate(bench.batch(settings, peer.data)), 1)}
    for mode in modes:
        works[mode] = _period(bench.state(bench.settings(precision=precision, **MODES[mode])), bench)
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(WARM_UP + rounds):
        for name, (work, count) in works.items():
            seconds = cost(work, bench.device, 0, 1).seconds / count
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
    return table([f"{rounds} in turns", "median ms", "fastest ms", "faster", "by the fastest"], rows)


def report(figures: Figures, modes: Sequence[str], precision: str) -> str:
    """Two tables: the modes against the plain version, and the parts of each."""
    cells = figures.record["cells"]
    rows = []
    for mode in (PLAIN, *modes):
        cell = cells[mode]
        ceiling = cells["ceiling fp32" if mode == PLAIN else f"ceiling {precision}"]
        rows.append(
            [
                mode,
                f"{cell['seconds'] * 1e3:.1f}",
                f"{cell['fastest'] * 1e3:.1f}-{cell['slowest'] * 1e3:.1f}",
                f"{cells[PLAIN]['seconds'] / cell['seconds']:.2f}",
                "-" if cell["peak"] is None else f"{cell['peak'] / 2**30:.2f}",
                f"{cell['flop'] / 1e12:.3f}",
                f"{cell['flop'] / cell['seconds'] / ceiling:.0%}",
            ]
        )
    whole = table(["iteration", "ms", "range", "faster", "peak GiB", "TFLOP", "of ceiling"], rows)
    split = table(
        ["part, ms", *modes],
        [
            [name, *(f"{cells[mode]['parts'][name]['seconds'] * 1e3:.1f}" for mode in modes)]
            for name in cells[modes[0]]["parts"]
        ],
    )
    return f"{whole}\n\n{split}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--precision", choices=list(DTYPES), help="bf16 on a GPU and fp32 elsewhere unless given")
    parser.add_argument("--resolution", type=int, default=0, help="pixels; 0 takes the family's own")
    parser.add_argument(
        "--alternate",
        type=int,
        default=0,
        metavar="N",
        help="N rounds of each, in turns",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    precision = given.precision or ("bf16" if device.type == "cuda" else "fp32")
    if given.alternate:
        bench = Workbench(given.scale, device, given.resolution)
        print(alternate(bench, given.modes, precision, given.alternate))
        return 0
    try:
        settings: dict[str, Any] = {"scale": given.scale, "resolution": given.resolution, "precision": precision}
        settings["modes"] = meaning()
        figures = Figures(given.out, "train_step", device, settings)
        measure(Workbench(given.scale, device, given.resolution), figures, given.modes, precision)
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {given.scale} scale, {precision}, {figures.record['date']}")
    print(report(figures, given.modes, precision))
    return 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
