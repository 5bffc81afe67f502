"""What each command does, once its flags are parsed."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..adapter.apply import personalised
from ..adapter.export import export_lora, export_merged, token_path
from ..adapter.file import Adapter, read_adapter
from ..concept.augment import to_unit
from ..concept.photographs import load_photograph, load_photographs, to_square
from ..concept.prompts import check_prompt
from ..errors import InputError
from ..models.family import Family
from ..models.open import open_family
from ..models.sources import FAMILIES, ModelSources
from ..reporting import RunPictures, save_picture, to_pictures
from ..sampling import sample as sample_images
from ..settings import EchoSettings, TrainSettings, from_options
from ..training import session
from ..training.run import STAGES, Run, fingerprint_of, open_run
from ..training.state import DTYPES, pick_device
from .arguments import given
from .progress import ProgressBar, stoppable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def train(options: argparse.Namespace) -> None:
    """Learn a concept from photographs."""
    settings = from_options(TrainSettings, given(options, TrainSettings))
    sources = from_options(ModelSources, given(options, ModelSources)).absolute()
    session.check_concept(settings)
    pick_device(settings.device)
    with _shown_warnings():
        photographs = load_photographs(options.photos if len(options.photos) > 1 else options.photos[0])
        needs_teacher = settings.teaches or settings.aligns
        family = _family(sources, with_teacher=needs_teacher)
    folder = Path(options.out) if options.out else _default_folder(settings, sources, photographs)
    _say(f"{len(photographs)} photographs of a {settings.class_noun} -> {folder}")
    with stoppable([ProgressBar(), RunPictures(folder)]) as listen:
        run = session.train(photographs, family, settings, sources, folder, listen)
    _finished(run, "distil")


def echo(options: argparse.Namespace) -> None:
    """Let the student's own samples teach both models."""
    run = open_run(options.run)
    settings = from_options(EchoSettings, given(options, EchoSettings))
    distil = run.settings
    with _shown_warnings():
        family = _family(run.sources, with_teacher=distil.teaches or distil.aligns)
    with stoppable([ProgressBar(), RunPictures(run.folder)]) as listen:
        run = session.echo(run, family, settings, listen)
    _finished(run, "echo")


def sample(options: argparse.Namespace) -> None:
    """Make pictures."""
    teacher = options.role == "teacher"
    adapters, sources = _adapters_and_sources(options)
    placeholders = {a.placeholder: a.class_noun for a in adapters}
    for prompt in options.prompt:
        check_prompt(prompt, placeholders)
    out = Path(options.out)
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"out {out} is no picture file; expected a name ending in {', '.join(IMAGE_SUFFIXES)}.")
    if options.batch < 1:
        raise InputError(f"batch is {options.batch}; expected 1 or more.")
    device = pick_device(options.device)
    with _shown_warnings():
        family = _family(sources, with_teacher=teacher).to(device, DTYPES[options.precision])
    prompts = [prompt for prompt in options.prompt for _ in range(options.batch)]
    with personalised(family, adapters, options.strength, role=options.role, any_base=options.any_base) as model:
        images = sample_images(
            model,
            prompts,
            seed=options.seed,
            steps=options.steps,
            height=options.height,
            width=options.width,
            guidance=options.guidance or (7.5 if teacher else 1.0),
            image=_start_picture(options, family),
            strength=options.denoise if options.image else 1.0,
        )
    pictures = to_pictures(images)
    for i, picture in enumerate(pictures):
        path = out if len(pictures) == 1 else out.with_stem(f"{out.stem}_{i:03d}")
        save_picture(path, picture)
        _say(f"{path}: {prompts[i]!r}, seed {options.seed + i}")


def info(options: argparse.Namespace) -> None:
    """Say what is in an adapter file or a run folder."""
    path = Path(options.path)
    facts = _run_facts(open_run(path)) if path.is_dir() else _adapter_facts(read_adapter(path))
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def export(options: argparse.Namespace) -> None:
    """Write a run or adapter for other tools."""
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
        _say(f"{out}: load it with diffusers' StableDiffusionPipeline.from_pretrained")
        return
    errors = export_lora(out, adapters[0], family.architecture, denoiser.unet.state_dict(), options.rank)
    for name, error in errors.items():
        print(f"{error:10.3e}  {name}")
    worst = max(errors.values(), default=0.0)
    _say(f"{out}: {len(errors)} matrices at rank {options.rank}, worst relative error {worst:.3g}")
    _say(f"{token_path(out)}: the token {adapters[0].placeholder}, for load_textual_inversion")


def download(options: argparse.Namespace) -> None:
    """Get checkpoints and backbones from the hub."""
    from ..models.download import describe, plan
    from ..models.download import download as fetch

    planned = plan(options.names, options.endpoint, options.cache_dir)
    print(describe(planned))
    if all(file.cached for file in planned):
        return
    if not options.yes:
        if not sys.stdin.isatty():
            raise InputError("nothing was downloaded: nobody is there to agree; add --yes to start without asking.")
        if input("Download now? [y/N] ").strip().lower() not in ("y", "yes"):
            _say("nothing was downloaded")
            return
    for name, folder in fetch(planned, options.endpoint, options.cache_dir).items():
        _say(f"{name}: {folder}")


def _adapters_and_sources(options: argparse.Namespace) -> tuple[list[Adapter], ModelSources]:
    """The adapters that a command is to use, and the models: a run's own unless flags say otherwise."""
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
        _say(f"warning: {warning}")
    return family


def _default_folder(settings: TrainSettings, sources: ModelSources, photographs: Sequence[Any]) -> Path:
    """runs/<noun>-<fingerprint>: the same command finds the same run again."""
    names = [p.name for p in photographs]
    key = fingerprint_of({"settings": str(settings), "sources": str(sources), "photographs": names})
    return Path("runs") / f"{settings.class_noun.replace(' ', '-')}-{key[:8]}"


def _finished(run: Run, stage: str) -> None:
    figures = run.record["finished"][stage]
    _say(f"{run.path(stage)}: finished after {figures['iterations']} iterations")
    for path in sorted(run.path(stage).glob("*.safetensors")):
        if path.name != "checkpoint.safetensors":
            _say(f"  {path} ({path.stat().st_size / 1e6:.1f} MB)")
    name = run.settings.placeholder
    _say(f'next: echodistill sample {run.folder} --prompt "a {name} {run.settings.class_noun} on the beach"')


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    deltas = adapter.all_deltas()
    norms = {n: float(d.norm()) for n, d in deltas.items()}
    facts: dict[str, Any] = {k: v for k, v in adapter.metadata.items() if k != "settings"}
    facts["weights"] = f"{len(deltas)} tensors, {sum(d.numel() for d in deltas.values())} numbers"
    facts["largest_change"] = max(norms, key=norms.__getitem__) if norms else "none"
    facts["token"] = f"{adapter.rows.shape[0]} row(s) of {adapter.rows.shape[1]} numbers"
    facts["prompt_stub"] = f"photo of a {adapter.placeholder} {adapter.class_noun}"
    facts["settings"] = json.loads(adapter.metadata.get("settings", "{}"))
    return facts


def _run_facts(run: Run) -> dict[str, Any]:
    facts = {k: run.record[k] for k in ("fingerprint", "photographs", "finished", "echo", "sources", "settings")}
    facts["adapters"] = [
        str(p.relative_to(run.folder))
        for stage in STAGES
        for p in sorted(run.path(stage).glob("*.safetensors"))
        if p.name != "checkpoint.safetensors"
    ]
    return facts


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Print this package's warnings as one line each instead of Python's two with a source line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for w in caught:
                if w.category is UserWarning:
                    _say(f"warning: {w.message}")


# diffusers and transformers report every cast and deprecation; what matters is checked here and said in one sentence.
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
