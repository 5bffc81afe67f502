"""Algorithm 1 in plain torch, diffusers and transformers: the method read literally, in float32, with nothing reused.

It is the peer that the package is timed against, and the truth that its losses and gradients are tested against. Of
the package it takes batches, random numbers, and the image pyramid and projections of MS-SWD, which have tests of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from echodistill_core.losses.color import srgb_to_lab
from echodistill_core.losses.ms_swd import gaussian_pyramid, levels_that_fit, project, random_projections
from echodistill_core.models.architectures import Architecture
from echodistill_core.perception.backbones import Backbone
from echodistill_core.settings import TrainSettings
from echodistill_core.training.batches import Batch
from echodistill_core.training.build import CRITICS

StateDict = dict[str, Tensor]


def sliced_wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Mean over P of the Wasserstein-1 distance between two samples of N numbers each: (B, P, N) twice to (B,).

    In one dimension the best transport pairs the sorted numbers: W1 = mean |sort(a) - sort(b)|.
    """
    return (a.sort(dim=-1).values - b.sort(dim=-1).values).abs().mean(dim=(1, 2))


def plain_ms_swd(a: Tensor, b: Tensor, generator: torch.Generator, levels: int, projections: int) -> Tensor:
    """Eq. 4 by autograd, all projections of a level at once: (B, 3, H, W) twice to (B,)."""
    levels = levels_that_fit(a.shape[-2], a.shape[-1], levels, 11)
    distances = []
    for x, y in zip(gaussian_pyramid(srgb_to_lab(a), levels), gaussian_pyramid(srgb_to_lab(b), levels), strict=True):
        directions = random_projections(projections, 11, generator, device=x.device, dtype=x.dtype)
        distances.append(sliced_wasserstein(project(x, directions).flatten(2), project(y, directions).flatten(2)))
    return torch.stack(distances).mean(0)


class Plain:
    """A training of the paper's settings, as method and settings describe it.

    checkpoints: "teacher" and "student" in diffusers' names, each with "unet"; the teacher's "text_encoder" and the
        student's "vae". The teacher predicts v and the student noise.
    ids_of: a prompt's token ids, the placeholder's row being the first past the vocabulary.
    heads: the critics' heads to start from, by role.
    """

    def __init__(
        self,
        settings: TrainSettings,
        architecture: Architecture,
        checkpoints: Mapping[str, Mapping[str, StateDict]],
        backbones: Mapping[str, Backbone],
        ids_of: Callable[[str], list[int]],
        heads: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.s, self.ids_of, self.device = settings, ids_of, torch.device(device)
        self.unets: dict[str, Any] = {}
        self.kv: dict[str, list[nn.Parameter]] = {}
        for role, checkpoint in checkpoints.items():
            self.unets[role] = unet = self._network(UNet2DConditionModel, architecture.unet, checkpoint["unet"])
            matrices = {n: p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
            self.names = list(matrices)
            self.kv[role] = [p.requires_grad_(True) for p in matrices.values()]
        self.vae: Any = self._network(AutoencoderKL, architecture.vae, checkpoints["student"]["vae"])
        text = CLIPTextConfig(**architecture.text_encoder)
        self.text_model: Any = self._network(CLIPTextModel, text, checkpoints["teacher"]["text_encoder"])
        table = self.text_model.get_input_embeddings().weight
        self.table_name = next(n for n, p in self.text_model.named_parameters() if p is table)
        noun = self.ids_of(settings.class_noun)[1:]
        noun = noun[: noun.index(architecture.text_encoder["eos_token_id"])]
        self.row = nn.Parameter(table[torch.tensor(noun, device=self.device)].float().mean(0, keepdim=True))
        scheduler = architecture.scheduler
        self.ddpm = {
            "teacher": DDPMScheduler(**scheduler, prediction_type="v_prediction"),
            "student": DDPMScheduler(**scheduler),
        }
        self.abar = self.ddpm["student"].alphas_cumprod.to(self.device)
        self.scale: float = architecture.vae["scaling_factor"]
        self.backbones = {role: backbone.float().to(self.device) for role, backbone in backbones.items()}
        self.data = torch.Generator().manual_seed(settings.seed + 1)
        self.noise = torch.Generator().manual_seed(settings.seed + 2)
        self.heads = {role: self._head(head) for role, head in heads.items()}
        adamw: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": settings.weight_decay}
        critics = [p for head in self.heads.values() for p in head.parameters()]
        s = settings
        self.optimizers = {
            "teacher": torch.optim.AdamW(
                [{"params": self.kv["teacher"], "lr": s.teacher_lr}, {"params": [self.row], "lr": s.token_lr}], **adamw
            ),
            "student": torch.optim.AdamW(self.kv["student"], lr=s.student_lr, **adamw),
            "critics": torch.optim.AdamW(critics, lr=s.critic_lr, **adamw),
        }

    def _network(self, kind: Any, config: Any, tensors: StateDict) -> Any:
        network = kind(**config) if isinstance(config, dict) else kind(config)
        # transformers 5 took a prefix away; both names lead to the same tensors.
        network.load_state_dict({n: t.float() for n, t in tensors.items()})
        return network.to(self.device).eval().requires_grad_(False)

    def _head(self, given: Any) -> nn.Module:
        head = nn.Sequential(nn.Linear(given.hidden.in_features, 512), nn.ReLU(), nn.Linear(512, 2))
        weights = (given.hidden.weight, given.hidden.bias, given.output.weight, given.output.bias)
        for own, start in zip(head.parameters(), weights, strict=True):
            own.data = start.detach().float().clone()
        return head.to(self.device)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Text features (B, 77, width), the whole encoder each time."""
        ids = torch.tensor([self.ids_of(p) for p in prompts], device=self.device)
        table = torch.cat([self.text_model.get_input_embeddings().weight, self.row])
        features: Tensor = functional_call(self.text_model, {self.table_name: table}, (ids,)).last_hidden_state
        return features

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents."""
        images: Tensor = self.vae.decode(z / self.scale).sample
        return images

    def look(self, role: str, x: Tensor) -> Tensor:
        """A backbone's features (B, d) of images, as the reference gives them: not normalised."""
        backbone: Any = self.backbones[role]
        side = backbone.spec.size
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
        if role == "clip":
            tokens: Tensor = backbone.projector(backbone.encoder(x).image_embeds).flatten(1)
            return tokens
        features: Tensor = backbone.encoder(x).last_hidden_state[:, 0]
        return features

    def step(self, name: str, parameters: Sequence[nn.Parameter], loss: Tensor, clip: float) -> Tensor:
        """One step of an optimiser. Returns the gradient's norm before clipping."""
        self.optimizers[name].zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizers[name].step()
        return norm

    def iterate(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration; the losses by the names that the package gives them."""
        return {n: v.detach() for n, v in {**self.teach(batch), **self.follow(batch)}.items()}

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        """Step 1: the teacher."""
        with torch.no_grad():
            posterior = self.vae.encode(batch.pixels).latent_dist
            drawn = batch.posterior_noise["teacher"]
            z = self.scale * (posterior.mean + posterior.std * drawn)
        noise, t = self._randn(z.shape), self._timesteps(len(z))
        zt, target = self.ddpm["teacher"].add_noise(z, noise, t), self.ddpm["teacher"].get_velocity(z, noise, t)
        out = self.unets["teacher"](zt, t, encoder_hidden_states=self.text(batch.prompts)).sample
        per_image = []
        for i in range(len(z)):
            valid = batch.mask[i, 0].bool()
            per_image.append((out[i] - target[i])[:, valid].pow(2).mean())
        loss = torch.stack(per_image).mean()
        norm = self.step("teacher", [*self.kv["teacher"], self.row], loss, self.s.grad_clip)
        return {"recon_teacher": loss, "grad_norm_teacher": norm}

    def follow(self, batch: Batch) -> dict[str, Tensor]:
        """Step 2 and 3: the student and the critics."""
        count = len(batch.pixels)
        losses: dict[str, Tensor] = {}
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        channels = self.unets["student"].config["in_channels"]
        n = self._randn((count, channels, batch.pixels.shape[-2] // factor, batch.pixels.shape[-1] // factor))
        text = self.text(batch.student_prompts).detach()
        eps = self.unets["student"](n, 999, encoder_hidden_states=text).sample
        z_st = (n - (1 - self.abar[999]).sqrt() * eps) / self.abar[999].sqrt()
        x_st = self.decode(z_st)
        with torch.no_grad():
            t = self._timesteps(count)
            zt = self.ddpm["teacher"].add_noise(z_st, n, t)
            without, with_text = (
                self.unets["teacher"](zt, t, encoder_hidden_states=self.text(prompts)).sample
                for prompts in ([""] * count, batch.student_prompts)
            )
            v = without + self.s.guidance_scale * (with_text - without)
            signal = self.abar[t].reshape(-1, 1, 1, 1)
            z_tc = signal.sqrt() * zt - (1 - signal).sqrt() * v
            x_tc = self.decode(z_tc)
            target = self.look("clip", x_tc)
        tokens_st, tokens_tc = (x.reshape(count, 4, -1) for x in (self.look("clip", x_st), target))
        cosine = (tokens_st * tokens_tc).sum(-1) / (tokens_st.norm(dim=-1) * tokens_tc.norm(dim=-1))
        terms = {
            "identity": 1 - cosine.mean(1),
            "mse": (z_st - z_tc).pow(2).flatten(1).mean(1),
            "swd": plain_ms_swd(x_st, x_tc, self.noise, self.s.swd_levels, self.s.swd_projections),
        }
        losses |= {name: value.mean() for name, value in terms.items()}
        losses["alignment"] = (self.abar[t] * (terms["identity"] + terms["mse"] + 0.1 * terms["swd"])).mean()
        total = losses["alignment"]
        for role in CRITICS:
            logits = self.heads[role](self.look(role, x_st))
            losses[f"adv_{role}"] = -logits.log_softmax(1)[:, 1].mean()
            total = total + losses[f"adv_{role}"]
        losses["grad_norm_student"] = self.step("student", self.kv["student"], total, self.s.grad_clip)
        loss = torch.zeros((), device=self.device)
        for role, head in self.heads.items():
            real = head(self.look(role, batch.real)).log_softmax(1)[:, 1]
            fake = head(self.look(role, x_st.detach())).log_softmax(1)[:, 0]
            losses[f"critic_{role}"] = -(real.mean() + fake.mean()) / 2
            loss = loss + losses[f"critic_{role}"]
        critics = [p for head in self.heads.values() for p in head.parameters()]
        losses["grad_norm_critics"] = self.step("critics", critics, loss, float("inf"))
        return losses

    def _randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(list(shape), generator=self.noise).to(self.device)

    def _timesteps(self, count: int) -> Tensor:
        return torch.randint(1000, (count,), generator=self.noise).to(self.device)
