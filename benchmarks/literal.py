"""A literal implementation of Algorithm 1 in torch, diffusers and transformers: float32, eager, nothing cached.

Benchmarks time the package against it, and tests compare the package's losses and gradients with it. Of the package it
uses only batches, critic heads, backbones, the colour conversion, and the pyramid and projections of MS-SWD; these have
tests of their own. Figure files and tables call it "plain".
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
    """Mean over P projections of the Wasserstein-1 distance of two samples of N numbers: (B, P, N) twice to (B,).

    In one dimension the optimal transport pairs the sorted numbers: W1 = mean |sort(a) - sort(b)|.
    """
    return (a.sort(dim=-1).values - b.sort(dim=-1).values).abs().mean(dim=(1, 2))


def literal_ms_swd(a: Tensor, b: Tensor, generator: torch.Generator, levels: int, projections: int) -> Tensor:
    """Eq. 4 by autograd, all projections of a level at once: (B, 3, H, W) twice to (B,)."""
    levels = levels_that_fit(a.shape[-2], a.shape[-1], levels, 11)
    distances = []
    for x, y in zip(gaussian_pyramid(srgb_to_lab(a), levels), gaussian_pyramid(srgb_to_lab(b), levels), strict=True):
        directions = random_projections(projections, 11, generator, device=x.device, dtype=x.dtype)
        distances.append(sliced_wasserstein(project(x, directions).flatten(2), project(y, directions).flatten(2)))
    return torch.stack(distances).mean(0)


class LiteralImplementation:
    """A training run of Algorithm 1 with the paper's method and these settings.

    checkpoints: "teacher" and "student" in diffusers' names, each with "unet"; the teacher's "text_encoder" and the
        student's "vae" are used. The teacher predicts v, the student noise.
    tokenize: from a prompt to its token ids; the placeholder's id is the first one past the vocabulary.
    heads: the critics' initial heads, by role.
    """

    def __init__(
        self,
        settings: TrainSettings,
        architecture: Architecture,
        checkpoints: Mapping[str, Mapping[str, StateDict]],
        backbones: Mapping[str, Backbone],
        tokenize: Callable[[str], list[int]],
        heads: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.settings, self.tokenize, self.device = settings, tokenize, torch.device(device)
        self.unets: dict[str, Any] = {}
        self.kv: dict[str, list[nn.Parameter]] = {}
        for role, checkpoint in checkpoints.items():
            self.unets[role] = unet = self._network(UNet2DConditionModel, architecture.unet, checkpoint["unet"])
            matrices = {n: p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
            self.kv_names = list(matrices)
            self.kv[role] = [p.requires_grad_(True) for p in matrices.values()]
        self.vae: Any = self._network(AutoencoderKL, architecture.vae, checkpoints["student"]["vae"])
        text = CLIPTextConfig(**architecture.text_encoder)
        self.text_model: Any = self._network(CLIPTextModel, text, checkpoints["teacher"]["text_encoder"])
        vocabulary = self.text_model.get_input_embeddings().weight
        self.vocabulary_name = next(n for n, p in self.text_model.named_parameters() if p is vocabulary)
        noun = self.tokenize(settings.class_noun)[1:]
        noun = noun[: noun.index(architecture.text_encoder["eos_token_id"])]
        noun_embeddings = vocabulary[torch.tensor(noun, device=self.device)].float()
        self.token_embedding = nn.Parameter(noun_embeddings.mean(0, keepdim=True))
        scheduler = architecture.scheduler
        self.ddpm = {
            "teacher": DDPMScheduler(**scheduler, prediction_type="v_prediction"),
            "student": DDPMScheduler(**scheduler),
        }
        self.alphas_cumprod = self.ddpm["student"].alphas_cumprod.to(self.device)
        self.vae_scale: float = architecture.vae["scaling_factor"]
        self.backbones = {role: backbone.float().to(self.device) for role, backbone in backbones.items()}
        self.data_generator = torch.Generator().manual_seed(settings.seed + 1)
        self.noise_generator = torch.Generator().manual_seed(settings.seed + 2)
        self.heads = {role: self._head(head) for role, head in heads.items()}
        self.optimizers = self._optimizers()

    def _network(self, kind: Any, config: Any, tensors: StateDict) -> Any:
        network = kind(**config) if isinstance(config, dict) else kind(config)
        # The checkpoints name the text encoder's tensors as transformers 5 does, without the prefix "text_model.".
        network.load_state_dict({n: t.float() for n, t in tensors.items()})
        return network.to(self.device).eval().requires_grad_(False)

    def _head(self, initial: Any) -> nn.Module:
        head = nn.Sequential(nn.Linear(initial.hidden.in_features, 512), nn.ReLU(), nn.Linear(512, 2))
        weights = (initial.hidden.weight, initial.hidden.bias, initial.output.weight, initial.output.bias)
        for parameter, weight in zip(head.parameters(), weights, strict=True):
            parameter.data = weight.detach().float().clone()
        return head.to(self.device)

    def _optimizers(self) -> dict[str, torch.optim.AdamW]:
        s = self.settings
        options: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": s.weight_decay}
        teacher = [
            {"params": self.kv["teacher"], "lr": s.teacher_lr},
            {"params": [self.token_embedding], "lr": s.token_lr},
        ]
        return {
            "teacher": torch.optim.AdamW(teacher, **options),
            "student": torch.optim.AdamW(self.kv["student"], lr=s.student_lr, **options),
            "critics": torch.optim.AdamW(self._critic_parameters(), lr=s.critic_lr, **options),
        }

    def _critic_parameters(self) -> list[nn.Parameter]:
        return [p for head in self.heads.values() for p in head.parameters()]

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text features (B, 77, width), by a full pass of the text encoder at each call."""
        ids = torch.tensor([self.tokenize(p) for p in prompts], device=self.device)
        embeddings = torch.cat([self.text_model.get_input_embeddings().weight, self.token_embedding])
        output = functional_call(self.text_model, {self.vocabulary_name: embeddings}, (ids,))
        features: Tensor = output.last_hidden_state
        return features

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, 4, h, w)."""
        images: Tensor = self.vae.decode(z / self.vae_scale).sample
        return images

    def features(self, role: str, x: Tensor) -> Tensor:
        """A backbone's features (B, d) of images (B, 3, H, W), not normalised, as in the reference code."""
        backbone: Any = self.backbones[role]
        side = backbone.spec.size
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
        if role == "clip":
            tokens: Tensor = backbone.projector(backbone.encoder(x).image_embeds).flatten(1)
            return tokens
        features: Tensor = backbone.encoder(x).last_hidden_state[:, 0]
        return features

    def optimizer_step(self, name: str, parameters: Sequence[nn.Parameter], loss: Tensor, max_norm: float) -> Tensor:
        """Step one optimiser on a loss. Returns the gradient's norm before clipping."""
        self.optimizers[name].zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        self.optimizers[name].step()
        return norm

    def iterate(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration. Returns the losses by the package's names, scalars."""
        losses = self.teacher_step(batch)
        x_st, student_losses = self.student_step(batch)
        losses |= student_losses
        losses |= self.critic_step(batch, x_st)
        return {n: v.detach() for n, v in losses.items()}

    def teacher_step(self, batch: Batch) -> dict[str, Tensor]:
        """Step 1: Eq. 1 on the photographs."""
        with torch.no_grad():
            posterior = self.vae.encode(batch.pixels).latent_dist
            z = self.vae_scale * (posterior.mean + posterior.std * batch.posterior_noise["teacher"])
        noise, t = self._randn(z.shape), self._timesteps(len(z))
        zt, target = self.ddpm["teacher"].add_noise(z, noise, t), self.ddpm["teacher"].get_velocity(z, noise, t)
        out = self.unets["teacher"](zt, t, encoder_hidden_states=self.encode_text(batch.prompts)).sample
        per_image = []
        for i in range(len(z)):
            valid = batch.mask[i, 0].bool()
            per_image.append((out[i] - target[i])[:, valid].pow(2).mean())
        loss = torch.stack(per_image).mean()
        parameters = [*self.kv["teacher"], self.token_embedding]
        norm = self.optimizer_step("teacher", parameters, loss, self.settings.grad_clip)
        return {"recon_teacher": loss, "grad_norm_teacher": norm}

    def student_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Step 2: Eq. 2 to 6. Returns the student's images (B, 3, H, W) and the losses."""
        s, count = self.settings, len(batch.pixels)
        losses: dict[str, Tensor] = {}
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        channels = self.unets["student"].config["in_channels"]
        n = self._randn((count, channels, batch.pixels.shape[-2] // factor, batch.pixels.shape[-1] // factor))
        text = self.encode_text(batch.student_prompts).detach()
        eps = self.unets["student"](n, 999, encoder_hidden_states=text).sample
        signal = self.alphas_cumprod[999]
        z_st = (n - (1 - signal).sqrt() * eps) / signal.sqrt()
        x_st = self.decode(z_st)
        with torch.no_grad():
            t = self._timesteps(count)
            z_tc = self._teacher_estimate(z_st, n, t, batch.student_prompts)
            x_tc = self.decode(z_tc)
            target = self.features("clip", x_tc)
        tokens_st, tokens_tc = (x.reshape(count, 4, -1) for x in (self.features("clip", x_st), target))
        cosine = (tokens_st * tokens_tc).sum(-1) / (tokens_st.norm(dim=-1) * tokens_tc.norm(dim=-1))
        terms = {
            "identity": 1 - cosine.mean(1),
            "mse": (z_st - z_tc).pow(2).flatten(1).mean(1),
            "swd": literal_ms_swd(x_st, x_tc, self.noise_generator, s.swd_levels, s.swd_projections),
        }
        losses |= {name: value.mean() for name, value in terms.items()}
        weighted = terms["identity"] + terms["mse"] + 0.1 * terms["swd"]
        losses["alignment"] = (self.alphas_cumprod[t] * weighted).mean()
        total = losses["alignment"]
        for role in CRITICS:
            logits = self.heads[role](self.features(role, x_st))
            losses[f"adv_{role}"] = -logits.log_softmax(1)[:, 1].mean()
            total = total + losses[f"adv_{role}"]
        losses["grad_norm_student"] = self.optimizer_step("student", self.kv["student"], total, s.grad_clip)
        return x_st.detach(), losses

    def _teacher_estimate(self, z: Tensor, noise: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The guided teacher's x0 estimate (B, 4, h, w) from the student's latents noised to timestep t."""
        zt = self.ddpm["teacher"].add_noise(z, noise, t)
        unconditional, conditional = (
            self.unets["teacher"](zt, t, encoder_hidden_states=self.encode_text(p)).sample
            for p in ([""] * len(prompts), prompts)
        )
        v = unconditional + self.settings.guidance_scale * (conditional - unconditional)
        signal = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return signal.sqrt() * zt - (1 - signal).sqrt() * v

    def critic_step(self, batch: Batch, x_st: Tensor) -> dict[str, Tensor]:
        """Step 3: the critics' loss on photographs and on the student's images x_st (B, 3, H, W), without a graph."""
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for role, head in self.heads.items():
            real = head(self.features(role, batch.real)).log_softmax(1)[:, 1]
            fake = head(self.features(role, x_st)).log_softmax(1)[:, 0]
            losses[f"critic_{role}"] = -(real.mean() + fake.mean()) / 2
            total = total + losses[f"critic_{role}"]
        norm = self.optimizer_step("critics", self._critic_parameters(), total, float("inf"))
        return losses | {"grad_norm_critics": norm}

    def _randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(list(shape), generator=self.noise_generator).to(self.device)

    def _timesteps(self, count: int) -> Tensor:
        return torch.randint(1000, (count,), generator=self.noise_generator).to(self.device)
