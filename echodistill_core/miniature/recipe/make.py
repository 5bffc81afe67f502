"""The recipe: every stage in order, from nothing to the shipped folders. Stages that are done are not done again."""

from __future__ import annotations

import platform
import sys
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
from .data import pairs, pictures
from .quality import base_quality
from .student import make_pairs, train_student
from .teacher import encode_all, tokenize, train_teacher
from .vae import standardise, train_vae


@dataclass(frozen=True)
class Amounts:
    """How much of everything: counts of pictures and steps.

    judged: whether the quality is measured at the end.
    """

    vae_scenes: int = 49152
    scenes: int = 24576
    encoder_pairs: int = 12288
    vae_steps: int = 3000
    teacher_steps: int = 3600
    teacher_samples: int = 6144
    student_steps: int = 1200
    backbone_steps: int = 400
    judge_steps: int = 500
    classifier_steps: int = 1200
    judged: bool = True


# Shows that the recipe runs.
TINY = Amounts(64, 64, 32, 2, 2, 32, 2, 2, 2, 2, judged=False)
VAE_PROBE = 4096  # pictures over which the latents' mean and variance are taken
SEEDS = {"dino": 41, "dinov2": 42, "clip": 43, "judge-clip": 31, "judge-attributes": 32, "judge-identity": 33}


def make(work: Path, out: Path, device: torch.device, amounts: Amounts) -> dict[str, float]:
    """Make the embedded family in the folder `out`; returns its quality figures.

    work: folder of data and checkpoints. The same call after an interruption goes on where it stopped.
    """
    began = time.monotonic()
    varied = pictures(work, amounts.vae_scenes, seed=1, wide=True)
    vae = train_vae(work / "vae.pt", varied, amounts.vae_steps, device)
    probe = replace(varied, captions=varied.captions[:VAE_PROBE])
    standardise(vae, encode_all(work / "probe.npy", vae, probe, device), MINIATURE.vae["scaling_factor"])
    scenes = pictures(work, amounts.scenes, seed=1, wide=False)
    latents = encode_all(work / "latents.npy", vae, scenes, device) * MINIATURE.vae["scaling_factor"]

    ids, empty = tokenize(scenes.captions), tokenize([""])
    teacher = train_teacher(work / "teacher.pt", latents, ids, empty, amounts.teacher_steps, device)
    chosen = ids[: amounts.teacher_samples]
    made = make_pairs(work / "pairs", teacher, chosen, empty, device)
    student = train_student(work / "student.pt", teacher, made, chosen, latents, ids, amounts.student_steps, device)
    judged = pairs(work, amounts.encoder_pairs, seed=2, all_colors=True)
    steps, more, seeds = amounts.judge_steps, amounts.classifier_steps, SEEDS
    judges = Judges(
        encoders.train_judge_identity(work / "judge-identity.pt", judged, steps, seeds["judge-identity"], device),
        encoders.train_judge_clip(work / "judge-clip.pt", judged, steps, seeds["judge-clip"], device),
        encoders.train_judge_attributes(work / "judge-attributes.pt", judged, more, seeds["judge-attributes"], device),
    )
    ship.write_judges(out / "judges", judges)
    seen = pairs(work, amounts.encoder_pairs, seed=3, all_colors=False)
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
    print(f"{out}: {size:.1f} MB, made in {minutes:.1f} minutes", file=sys.stderr)  # noqa: T201
    return figures
