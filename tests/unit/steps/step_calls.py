"""Settings with single terms, and records of what a step calls, computes and decodes."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from echodistill_core.models.architectures import TINY
from echodistill_core.perception.backbones import Backbone

ALL_TERMS = {
    "teacher_weight": 0.0,
    "alignment_weight": 1.0,
    "identity_weight": 0.0,
    "mse_weight": 0.0,
    "swd_weight": 0.0,
    "adversarial_weight": 1.0,
    "dino_weight": 0.0,
    "dinov2_weight": 0.0,
    "clip_weight": 0.0,
}
STUDENT_TERMS = {
    "identity": {"identity_weight": 1.0},
    "mse": {"mse_weight": 1.0},
    "swd": {"swd_weight": 0.1},
    "adv_dino": {"dino_weight": 1.0},
    "adv_dinov2": {"dinov2_weight": 1.0},
    "adv_clip": {"clip_weight": 1.0},
    "recon_student": {"student_reconstruction_weight": 1.0},
}


def only(**weights):
    """Settings with every term off but these; without decay a tensor changes only where a gradient reaches it."""
    return {**ALL_TERMS, "weight_decay": 0.0, **weights}


def keys_and_values(state, role):
    unet = getattr(state.family, role).unet
    return {
        f"{role}/{name}.{leaf}.weight"
        for name, module in unet.named_modules()
        if name.endswith("attn2")
        for leaf in ("to_k", "to_v")
        if getattr(module, leaf).weight.shape[1] == TINY.text_width
    }


@contextmanager
def watched(monkeypatch, denoiser):
    """Every call of denoiser.predict: its inputs, its output, and whether gradients were on."""
    calls, predict = [], type(denoiser).predict

    def spy(self, zt, t, text):
        out = predict(self, zt, t, text)
        if self is denoiser:
            if out.requires_grad:
                out.retain_grad()
            calls.append(SimpleNamespace(zt=zt, t=t, text=text, out=out, graded=torch.is_grad_enabled()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(denoiser), "predict", spy)
        yield calls


def record_forwards(monkeypatch, seen):
    """Append a backbone's name to `seen` at each of its forward passes."""
    forward = Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, *args, **more: seen.append(self.spec.name) or forward(self, *args, **more)
    )


def first_gradients(state, name):
    """The gradients that an optimiser's first step was given: AdamW's first moment after it is 0.1 of them."""
    moments = state.trainables.optimizers[name].state
    return torch.cat([moments[p]["exp_avg"].flatten() for p in state.trainables.parameters(name)]) / 0.1


FULL = {
    *(
        "recon_teacher",
        "grad_norm_teacher",
        "identity",
        "mse",
        "swd",
        "alignment",
        "grad_norm_student",
        "grad_norm_critics",
    ),
    *(f"{what}_{role}" for what in ("adv", "critic") for role in ("dino", "dinov2", "clip")),
}
ALIGNMENT = {"identity", "mse", "swd", "alignment"}
ADVERSARIAL = {n for n in FULL if n.startswith(("adv_", "critic_", "grad_norm_critics"))}
CRITICS = {"dino", "dinov2", "clip"}
