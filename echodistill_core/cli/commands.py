"""The commands, each a function of its parsed flags."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..adapter.apply import personalised
from ..adapter.export import export_lora, export_merged, token_path
from ..adapter.file import Adapter, read_adapter
from ..concept.augment import to_unit
from ..concept.photographs import Photograph, load_photograph, load_photographs, to_square
from ..devices import DTYPES, pick_device
from ..errors import InputError
from ..eventlog import EventLog
from ..miniature.concepts import outside_domain_warning
from ..models.family import Family
from ..models.open import open_family
from ..models.sources import FAMILIES, ModelSources, settings_for
from ..models.text import check_prompt
from ..reporting import RunPictures, save_picture, to_pictures
from ..sampling import TEACHER_STEPS
from ..sampling import sample as sample_images
from ..settings import EchoSettings, TrainSettings, affecting_result, from_options
from ..training import session
from ..training.build import needs_teacher
from ..training.events import Listener
from ..training.identity import fingerprint_of
from ..training.run import STAGES, Run, open_run
from ..training.start import start_files
from .arguments import COMPUTING, given
from .facts import adapter_facts, environment_facts, lines, run_facts
from .progress import ProgressBar, has_display, say, stoppable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def demo(options: argparse.Namespace) -> None:
    """Learn one subject with the embedded family and write an HTML page with the results."""
    from ..demo.demo import check_folder, learn
    from ..demo.settings import DemoSettings
    from ..demo.task import choose

    settings = from_options(DemoSettings, given(options, DemoSettings))
    pick_device(settings.device)
    task = choose(settings, options.photos)
    if task.photos:
        _warn_outside_domain(task.photographs, task.class_noun)
    plain = not task.photos and affecting_result(settings) == affecting_result(DemoSettings())
    name = "demo" if plain else f"demo-{_name(task.class_noun, affecting_result(settings), task.photographs)}"
    folder = Path(options.out) if options.out else Path("runs") / name
    check_folder(folder, task, settings)
    say(f"{task.title}: {_counted(task.photographs)} -> {folder}")
    bar = ProgressBar()

    def tell(text: str) -> None:
        bar.close()
        say(text)

    with stoppable([bar, EventLog()]) as listen:
        page = learn(task, settings, folder, listen, tell)
    if settings.open and sys.stdout.isatty() and has_display():
        webbrowser.open(page.resolve().as_uri())
    say(f"done: open {page} in a browser")


def train(options: argparse.Namespace) -> None:
    """Learn a concept from photographs."""
    sources = from_options(ModelSources, given(options, ModelSources)).absolute()
    listeners = _optional_listeners(options)
    settings = settings_for(TrainSettings, given(options, TrainSettings), sources)
    session.check_concept(settings)
    pick_device(settings.device)
    start = start_files(options.start_from)
    paths = options.photos if len(options.photos) > 1 else options.photos[0]
    photographs = load_photographs(paths, settings.max_photographs)
    family = _family(sources, with_teacher=needs_teacher(settings, start))
    if options.config.lower().endswith(".json"):
        repeated = open_run(Path(options.config).parent)
        if sources == repeated.sources.absolute():
            repeated.check_family(family)
    if sources.family == "miniature":
        _warn_outside_domain(photographs, settings.class_noun)
    folder = Path(options.out) if options.out else _default_folder(settings, sources, photographs, start)
    say(f"{settings.class_noun}: {_counted(photographs)} -> {folder}")
    listeners += [ProgressBar(), RunPictures(folder), EventLog()]
    with stoppable(listeners) as listen:
        run = session.train(photographs, family, settings, sources, folder, listen, start)
    _finished(run, "distil")


def echo(options: argparse.Namespace) -> None:
    """Run the echoing stage: train both models on samples of the student."""
    listeners = _optional_listeners(options)
    run = open_run(options.run)
    settings = settings_for(EchoSettings, given(options, EchoSettings), run.sources)
    own = given(options, TrainSettings)
    run.record["settings"].update({name: own[name] for name in COMPUTING if name in own})
    distil = run.settings
    family = _family(run.sources, with_teacher=needs_teacher(distil, run.start_files()))
    listeners += [ProgressBar(), RunPictures(run.folder), EventLog()]
    with stoppable(listeners) as listen:
        run = session.echo(run, family, settings, listen)
    _finished(run, "echo")


def sample(options: argparse.Namespace) -> None:
    """Generate images."""
    teacher = options.role == "teacher"
    adapters, sources = _adapters_and_sources(options)
    placeholders = {a.placeholder: a.class_noun for a in adapters}
    for prompt in options.prompt:
        check_prompt(prompt, placeholders)
    out = Path(options.out)
    _check_sampling(options, out)
    device = pick_device(options.device)
    family = _family(sources, with_teacher=teacher).to(device, DTYPES[options.precision])
    start = _start_picture(options, family)
    prompts = [prompt for prompt in options.prompt for _ in range(options.batch)]
    with personalised(family, adapters, options.strength, role=options.role, any_base=options.any_base) as model:
        images = sample_images(
            model,
            prompts,
            seed=options.seed,
            steps=options.steps or (TEACHER_STEPS if teacher else 1),
            height=options.height,
            width=options.width,
            guidance=options.guidance or (settings_for(TrainSettings, {}, sources).guidance_scale if teacher else 1.0),
            image=start,
            strength=options.denoise if options.image else 1.0,
        )
    pictures = to_pictures(images)
    for i, picture in enumerate(pictures):
        path = out if len(pictures) == 1 else out.with_stem(f"{out.stem}_{i:03d}")
        replaced = " (replaced)" if path.exists() else ""
        save_picture(path, picture)
        say(f"{path}{replaced}: {prompts[i]!r}, seed {options.seed + i}")


def info(options: argparse.Namespace) -> None:
    """Describe an adapter file or a run folder; without a path, the environment."""
    path = Path(options.path)
    if not options.path:
        facts = environment_facts()
    else:
        facts = run_facts(open_run(path)) if path.is_dir() else adapter_facts(read_adapter(path))
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    print("\n".join(lines(facts)))


def export(options: argparse.Namespace) -> None:
    """Convert a run or adapter for other tools."""
    path, out = Path(options.path), Path(options.out)
    if path.is_dir():
        options.run, options.adapter = options.path, []
    else:
        options.run, options.adapter = "", [options.path]
    adapters, sources = _adapters_and_sources(options)
    family = _family(sources, with_teacher=options.role == "teacher")
    denoiser = family.teacher if options.role == "teacher" else family.student
    assert denoiser is not None
    if options.to == "merged":
        export_merged(out, adapters[0], family, any_base=options.any_base)
        say(f"{out}: load it with diffusers' StableDiffusionPipeline.from_pretrained")
        return
    errors = export_lora(out, adapters[0], family.architecture, denoiser.unet.state_dict(), options.rank)
    for name, error in errors.items():
        print(f"{error:10.3e}  {name}")
    worst = max(errors.values(), default=0.0)
    say(f"{out}: {len(errors)} matrices at rank {options.rank}, worst relative error {worst:.3g}")
    say(f"{token_path(out)}: the token {adapters[0].placeholder}, for load_textual_inversion")


def bench(options: argparse.Namespace) -> None:
    """Run the cells of a bench suite that have no result yet, and write the report."""
    from ..evaluation import suites

    suite = suites.QUICK if options.quick else suites.suite_named(options.suite)
    for name, default in (("seeds", "the suite's own number"), ("workers", "one a core")):
        if getattr(options, name) < 0:
            raise InputError(f"{name} is {getattr(options, name)}; expected 1 or more, or 0 for {default}.")
    suite = suites.select(suite, trainings=options.trainings, seeds=options.seeds, development=options.development)
    folder = Path(options.out or ("runs/bench-quick" if options.quick else f"runs/bench-{options.suite}"))
    command = " ".join(["echodistill", *sys.argv[1:]])
    workers = 0 if options.report else options.workers or os.cpu_count() or 1
    for path in suites.bench(folder, suite, workers=workers, command=command, log=say):
        say(f"{path}")


def download(options: argparse.Namespace) -> None:
    """Download checkpoints and backbones from the hub."""
    from ..models.download import describe, plan
    from ..models.download import download as fetch

    planned = plan(options.names, options.endpoint, options.cache_dir)
    print(describe(planned))
    if all(file.cached for file in planned):
        return
    if not options.yes:
        if not sys.stdin.isatty():
            raise InputError(
                "nothing was downloaded: there is no terminal to confirm on; add --yes to start without asking."
            )
        if input("Download now? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was downloaded")
            return
    for name, folder in fetch(planned, options.endpoint, options.cache_dir).items():
        say(f"{name}: {folder}")


def _adapters_and_sources(options: argparse.Namespace) -> tuple[list[Adapter], ModelSources]:
    """The adapters and the model sources of a command: those of its run, unless flags replace them."""
    own = given(options, ModelSources)
    if not options.run:
        adapters = [read_adapter(path) for path in options.adapter]
        family = adapters[0].metadata.get("family") if adapters else None
        default = {"family": family} if family in FAMILIES and not own.keys() & {"family", "student"} else {}
        return adapters, from_options(ModelSources, {**default, **own})
    run = open_run(options.run)
    stage = options.stage
    if stage == "auto":
        stage = next((s for s in reversed(STAGES) if run.is_finished(s)), "distil")
    path = run.path(stage, f"{options.role}.safetensors")
    if not path.is_file():
        raise InputError(
            f"the run {run.folder} has no {stage}/{options.role}.safetensors; finish its training with the same "
            "command, or choose another --stage or --role."
        )
    sources = from_options(ModelSources, {**run.record["sources"], **own})
    return [read_adapter(p) for p in (path, *options.adapter)], sources


def _check_sampling(options: argparse.Namespace, out: Path) -> None:
    """Raise InputError for invalid flags before the models are loaded."""
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"out {out} is not an image file; expected a name ending in {', '.join(IMAGE_SUFFIXES)}.")
    if not out.parent.is_dir():
        raise InputError(
            f"out {out} cannot be written: the folder {out.parent} does not exist; create it or choose another."
        )
    if options.batch < 1:
        raise InputError(f"batch is {options.batch}; expected 1 or more.")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"seed is {options.seed}; expected 0 to {2**63 - 1}.")
    if not 0 < options.denoise <= 1:
        raise InputError(f"denoise is {options.denoise}; expected over 0 (keep the image), at most 1 (redraw it).")


def _start_picture(options: argparse.Namespace, family: Family) -> Tensor | None:
    if not options.image:
        return None
    photograph = load_photograph(options.image).image
    size = family.architecture.resolution
    width, height = options.width or size, options.height or size
    if width == height:
        return to_unit(to_square(photograph, width, "center"))[None]
    from PIL import ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    return to_unit(pil_to_tensor(ImageOps.fit(photograph, (width, height))))[None]


def _family(sources: ModelSources, *, with_teacher: bool) -> Family:
    family = open_family(sources, with_teacher=with_teacher)
    for warning in family.warnings:
        say(f"warning: {warning}")
    return family


def _optional_listeners(options: argparse.Namespace) -> list[Listener]:
    """The TensorBoard listener, if --tensorboard names a folder. Raises InputError where it is not installed."""
    if not options.tensorboard:
        return []
    from ..tensorboard import TensorBoard

    return [TensorBoard(options.tensorboard)]


def _default_folder(
    settings: TrainSettings, sources: ModelSources, photographs: Sequence[Photograph], start: Mapping[str, Path]
) -> Path:
    """runs/<noun>-<fingerprint>, so that the same command resumes the same run."""
    begun = {f"start_{role}": hashlib.sha256(path.read_bytes()).hexdigest() for role, path in start.items()}
    identity = {**affecting_result(settings), **dataclasses.asdict(sources), **begun}
    return Path("runs") / _name(settings.class_noun, identity, photographs)


def _name(class_noun: str, identity: Mapping[str, Any], photographs: Sequence[Photograph]) -> str:
    """<noun>-<fingerprint of the identity and of the photographs' pixels>."""
    contents = [hashlib.sha256(p.image.tobytes()).hexdigest() for p in photographs]
    noun = re.sub(r"\W+", "-", class_noun).strip("-")
    return f"{noun}-{fingerprint_of({**identity, 'photographs': contents})[:8]}"


def _warn_outside_domain(photographs: Sequence[Photograph], class_noun: str) -> None:
    warning = outside_domain_warning(photographs, class_noun)
    if warning:
        say(f"warning: {warning}")


def _counted(photographs: Sequence[Photograph]) -> str:
    return f"{len(photographs)} photograph{'s' if len(photographs) > 1 else ''}"


def _finished(run: Run, stage: str) -> None:
    figures = run.record["finished"][stage]
    say(f"{run.path(stage)}: finished after {figures['iterations']} iterations")
    for path in sorted(run.path(stage).glob("*.safetensors")):
        if path.name != "checkpoint.safetensors":
            say(f"  {path} ({path.stat().st_size / 1e6:.1f} MB)")
    name = run.settings.placeholder
    echo = f"echodistill echo {run.folder}, or " if stage == "distil" and not run.is_finished("echo") else ""
    say(f'next: {echo}echodistill sample {run.folder} --prompt "a {name} {run.settings.class_noun} on the beach"')


# diffusers and transformers report every cast and deprecation; this package checks its inputs itself.
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
