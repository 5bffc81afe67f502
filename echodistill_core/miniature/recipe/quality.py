"""Quality of the base models, measured by judges with independent training data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...concept.augment import to_unit
from ...models.family import Denoiser, Family
from ...sampling import denoise, draw_noise
from ..judges import ATTRIBUTES, Judges
from ..render import render_all
from ..world import (
    COLORS,
    CONTEXTS,
    SHAPES,
    Scene,
    Subject,
    describe,
    random_captioned_scene,
    random_scene,
    random_subject,
)
from .vae import psnr

SEED = 77  # of evaluation prompts, scenes and noise; not used in training
TEACHER_STEPS, GUIDANCE = 25, 3.0


def base_quality(family: Family, judges: Judges) -> dict[str, float]:
    """All figures that the recipe prints; shares are 0..1.

    vae_psnr: dB, mean over 512 unseen images. judge_*: accuracy on 1,024 unseen images.
    teacher, student: share of samples with correct shape, colour and context, over all shapes in all contexts (plain
    subjects); *_pattern, *_emblem: of prompts that name them.
    """
    assert family.teacher is not None
    figures = {"vae_psnr": vae_psnr(family), **judge_accuracy(judges)}
    for role, denoiser, steps, guidance in (
        ("teacher", family.teacher, TEACHER_STEPS, GUIDANCE),
        ("student", family.student, 1, 1.0),
    ):
        images, scenes = _plain_samples(family, denoiser, steps, guidance)
        right = {name: matches(judges.attributes(images), scenes, name) for name in ("shape", "color", "context")}
        figures |= {f"{role}_{name}": float(v.float().mean()) for name, v in right.items()}
        figures[role] = float(torch.stack(list(right.values())).all(0).float().mean())
        images, scenes = _detailed_samples(family, denoiser, steps, guidance)
        for name in ("pattern", "emblem"):
            figures[f"{role}_{name}"] = float(matches(judges.attributes(images), scenes, name).float().mean())
    return figures


def matches(seen: dict[str, Tensor], scenes: list[Scene], name: str) -> Tensor:
    """Whether the classifier's prediction of an attribute equals the scene's: bool (B,)."""
    values, read = ATTRIBUTES[name]
    return seen[name].cpu() == torch.tensor([values.index(read(scene)) for scene in scenes])


def judge_accuracy(judges: Judges) -> dict[str, float]:
    """The classifier's accuracy on unseen images, by attribute."""
    rng = np.random.default_rng(SEED + 1)
    scenes = [
        random_scene(random_subject(rng, all_colors=True), str(rng.choice(list(CONTEXTS))), rng) for _ in range(1024)
    ]
    seen = judges.attributes(_pixels(scenes))
    return {f"judge_{name}": float(matches(seen, scenes, name).float().mean()) for name in ATTRIBUTES}


@torch.no_grad()
def vae_psnr(family: Family) -> float:
    """Mean reconstruction PSNR over 512 unseen images in dB: 10 log10(4 / mse)."""
    rng = np.random.default_rng(SEED)
    x = _pixels([random_captioned_scene(rng)[0] for _ in range(512)])
    values = []
    for part in x.split(64):
        decoded = family.decode(family.encode(part.to(family.device))).clamp(-1, 1).cpu()
        values.append(psnr((decoded - part).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


def _pixels(scenes: list[Scene]) -> Tensor:
    return to_unit(torch.from_numpy(render_all(scenes)))


def _plain_samples(family: Family, denoiser: Denoiser, steps: int, guidance: float) -> tuple[Tensor, list[Scene]]:
    """Four samples of every shape in every context, cycling through plain colours."""
    rng = np.random.default_rng(SEED + 2)
    scenes, prompts = [], []
    for i, (shape, context) in enumerate((s, c) for s in SHAPES for c in CONTEXTS):
        for k in range(4):
            color = list(COLORS)[(i // len(CONTEXTS) + i + 2 * k) % len(COLORS)]
            scene = random_scene(random_subject(rng), context, rng)
            scenes.append(replace(scene, subject=Subject(shape, color, second=color)))
            prompts.append(f"photo of a {color} {shape} {CONTEXTS[context]}")
    return _sample(family, denoiser, prompts, steps, guidance), scenes


def _detailed_samples(family: Family, denoiser: Denoiser, steps: int, guidance: float) -> tuple[Tensor, list[Scene]]:
    """256 samples of subjects with pretraining's pairs of colours, fully described."""
    rng = np.random.default_rng(SEED + 3)
    scenes = [random_scene(random_subject(rng), str(rng.choice(list(CONTEXTS))), rng) for _ in range(256)]
    prompts = [f"photo of a {describe(s.subject)} {CONTEXTS[s.context]}" for s in scenes]
    return _sample(family, denoiser, prompts, steps, guidance), scenes


@torch.no_grad()
def _sample(family: Family, denoiser: Denoiser, prompts: list[str], steps: int, guidance: float) -> Tensor:
    images = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        size = family.architecture.resolution
        noise = draw_noise(family, len(part), size, size, SEED * 1000 + start).to(family.device)
        text = family.condition(part)
        unconditional = family.condition([""]).expand(len(text)) if guidance != 1 else None
        latents = denoise(denoiser, noise, text, steps, unconditional=unconditional, guidance=guidance)
        images.append(family.decode(latents).clamp(-1, 1).cpu())
    return torch.cat(images)
