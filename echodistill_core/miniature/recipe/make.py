"""The recipe: all stages in order, up to the package's folders. Finished stages are skipped."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers

from ...models.architectures import MINIATURE
from ...models.load import load_family
from ..judges import Judges
from . import encoders, ship
from .data import load_images, load_pairs
from .quality import base_quality
from .stage import log_progress
from .student import make_pairs, train_student
from .teacher import encode_all, tokenize, train_teacher
from .vae import standardise, train_vae


@dataclass(frozen=True)
class Amounts:
    """Numbers of images, pairs of images, samples and training steps.

    teacher_steps: in each cycle.
    judged: whether the quality is measured at the end.
    """

    vae_scenes: int = 49152
    scenes: int = 24576
    encoder_pairs: int = 12288
    vae_steps: int = 3000
    teacher_steps: tuple[int, ...] = (2000, 1600, 3000)
    teacher_samples: int = 8192
    student_steps: int = 1600
    backbone_steps: int = 400
    identity_steps: int = 500
    image_text_steps: int = 1800
    classifier_steps: int = 1200
    judged: bool = True


# For testing the recipe.
TINY = Amounts(
    vae_scenes=64,
    scenes=64,
    encoder_pairs=32,
    vae_steps=2,
    teacher_steps=(1, 1, 1),
    teacher_samples=32,
    student_steps=2,
    backbone_steps=2,
    identity_steps=2,
    image_text_steps=2,
    classifier_steps=2,
    judged=False,
)
VAE_PROBE = 4096  # images for the latents' mean and variance
SEEDS = {"dino": 41, "dinov2": 42, "clip": 43, "judge-clip": 31, "judge-attributes": 32, "judge-identity": 33}


def make(work: Path, out: Path, device: torch.device, amounts: Amounts) -> dict[str, float]:
    """Train the embedded family into the folder `out`; returns its quality figures.

    work: folder of data and checkpoints. The same call after an interruption resumes.
    """
    began = time.monotonic()
    varied = load_images(work, amounts.vae_scenes, seed=1, wide=True)
    vae = train_vae(work / "vae.pt", varied, amounts.vae_steps, device)
    probe = replace(varied, captions=varied.captions[:VAE_PROBE])
    standardise(vae, encode_all(work / "probe.npy", vae, probe, device), MINIATURE.vae["scaling_factor"])
    scenes = load_images(work, amounts.scenes, seed=1, wide=False)
    latents = encode_all(work / "latents.npy", vae, scenes, device) * MINIATURE.vae["scaling_factor"]

    ids, empty = tokenize(scenes.captions), tokenize([""])
    teacher = train_teacher(work / "teacher.pt", latents, ids, empty, amounts.teacher_steps, device)
    chosen = ids[: amounts.teacher_samples]
    made = make_pairs(work / "pairs", teacher, chosen, empty, device)
    student = train_student(work / "student.pt", teacher, made, chosen, latents, ids, amounts.student_steps, device)

    judges = _train_judges(work, amounts, device)
    ship.write_judges(out / "judges", judges)
    seen = load_pairs(work, amounts.encoder_pairs, seed=3, all_colors=False)
    for name in ("dino", "dinov2", "clip"):
        path = work / f"{name}.pt"
        backbone = encoders.train_backbone(name, path, seen, amounts.backbone_steps, SEEDS[name], device)
        ship.write_backbone(out / "backbones" / name, backbone)
    ship.write_family(out, teacher, student, vae)

    figures: dict[str, float] = {}
    if amounts.judged:
        family = load_family(out / "student", out / "teacher", name="miniature").to(device, torch.float32)
        judges = Judges(*(m.float().cpu() for m in (judges.identity_encoder, judges.clip, judges.classifier)))
        figures = base_quality(family, judges)
    facts = {
        "quality": figures,
        "amounts": asdict(amounts),
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "device": str(device),
        },
    }
    ship.write_manifest(out, facts)
    minutes = (time.monotonic() - began) / 60
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6
    log_progress(f"{out}: {size:.1f} MB, made in {minutes:.1f} minutes")
    return figures


def _train_judges(work: Path, amounts: Amounts, device: torch.device) -> Judges:
    """Train the three judges, on images that include the held-out pairs of colours."""
    data = load_pairs(work, amounts.encoder_pairs, seed=2, all_colors=True)
    paths = {name: work / f"{name}.pt" for name in ("judge-identity", "judge-clip", "judge-attributes")}
    return Judges(
        encoders.train_judge_identity(
            paths["judge-identity"], data, amounts.identity_steps, SEEDS["judge-identity"], device
        ),
        encoders.train_judge_clip(paths["judge-clip"], data, amounts.image_text_steps, SEEDS["judge-clip"], device),
        encoders.train_judge_attributes(
            paths["judge-attributes"], data, amounts.classifier_steps, SEEDS["judge-attributes"], device
        ),
    )
