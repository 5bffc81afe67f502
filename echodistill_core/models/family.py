"""A family: student, teacher, and the text encoder and VAE that both share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..diffusion import NoiseSchedule
from ..errors import InputError
from .architectures import Architecture
from .conditioning import TextConditioning
from .fingerprint import block_fingerprints, sampled_fingerprint
from .text import TextEncoder


@dataclass
class Denoiser:
    """A UNet with its noise schedule.

    fingerprint: of its cross-attention keys and values as loaded; it is equal for different files of the same model.
    origin: the checkpoint, for messages and metadata. licence: of the checkpoint, if known.
    """

    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    fingerprint: str
    origin: str
    licence: str = "unknown"

    def predict(self, zt: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """The UNet's prediction (B, 4, h, w) for latents zt (B, 4, h, w), timesteps t (B,) and B prompts.

        Returns float32: the one-step map divides by sqrt(abar_{T-1}), which amplifies rounding errors 15 times.
        """
        dtype = self.unet.conv_in.weight.dtype
        out = self.unet(
            zt.to(dtype), t, encoder_hidden_states=text.features.to(dtype), added_cond_kwargs=text.added_conditions
        )
        return out.sample.float()


@dataclass
class Family:
    """The pretrained models of a run. Training mutates them in place; `restore` always puts the loaded tensors back.

    teacher: None if it was not loaded (sampling, baselines without a teacher).
    text_fingerprint: of the text encoder. warnings: about the checkpoints, for the user.
    loaded: network -> parameter -> tensor as loaded. on_restore: called by `restore` before it does anything else.
    """

    name: str
    architecture: Architecture
    student: Denoiser
    teacher: Denoiser | None
    text: TextEncoder
    vae: AutoencoderKL
    text_fingerprint: str
    warnings: list[str] = field(default_factory=list)
    loaded: dict[str, dict[str, Tensor]] = field(init=False, repr=False)
    on_restore: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _blocks: dict[str, dict[str, str]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        # References, no copies. Tensors that are mapped from a file take no memory while they are unused.
        self.loaded = {n: {k: t.detach() for k, t in m.state_dict().items()} for n, m in self.networks().items()}
        width = self.student.unet.config["cross_attention_dim"]
        if self.teacher is not None:
            other = self.teacher.unet.config["cross_attention_dim"]
            if other != width:
                raise InputError(
                    f"teacher and student read text of different widths: {self.teacher.origin} reads {other}, "
                    f"{self.student.origin} reads {width}; take both from one family (SD 2.1 with SD-Turbo)."
                )
        if self.text.width != width:
            raise InputError(
                f"the text encoder is {self.text.width} wide, but the student {self.student.origin} reads {width}; "
                "use the text encoder of the student's own checkpoint."
            )

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along a side: 8 for every Stable Diffusion VAE."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: 4 for every Stable Diffusion VAE."""
        return int(self.vae.config["latent_channels"])

    @property
    def device(self) -> torch.device:
        """The device of the student."""
        return self.student.unet.conv_in.weight.device

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name: "student", "teacher" if it was loaded, "text", "vae"."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.unet}
        return {"student": self.student.unet, **teacher, "text": self.text.model, "vae": self.vae}

    def blocks(self, role: str) -> dict[str, str]:
        """Block -> fingerprint of a role's UNet as loaded; computed once."""
        if role not in self._blocks:
            self._blocks[role] = block_fingerprints(self.loaded[role])
        return self._blocks[role]

    def weights_fingerprint(self, network: str) -> str:
        """The sampled fingerprint of a network of `networks`, as loaded."""
        return sampled_fingerprint(self.loaded[network])

    def freeze(self) -> Family:
        """Set every network to evaluation mode without gradients, in place. Training enables those that it needs."""
        for module in self.networks().values():
            module.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Family:
        """Move and cast every network, in place."""
        for module in self.networks().values():
            # Not diffusers' `to`, which warns about modules to keep in float32 even if the model has none.
            nn.Module.to(module, device=device, dtype=dtype)
        return self

    def restore(self) -> Family:
        """Undo `to` and training, in place: the networks get the loaded tensors, frozen, and no placeholders."""
        while self.on_restore:
            self.on_restore.pop()()
        for name, network in self.networks().items():
            for module in list(network.modules()):
                for leaf in list(getattr(module, "parametrizations", {})):
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            for key, tensor in self.loaded[name].items():
                path, _, leaf = key.rpartition(".")
                setattr(network.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
            for buffer in network.buffers():
                buffer.data = buffer.data.to("cpu")
        self.text = self.text.with_placeholders({})
        return self

    def condition(self, prompts: Sequence[str], token_embeddings: Tensor | None = None) -> TextConditioning:
        """tau(prompt) of B prompts. A family with two text encoders would concatenate their features here.

        token_embeddings: of the placeholders, (n, width). Raises InputError as TextEncoder.forward does.
        """
        return TextConditioning(self.text(prompts, token_embeddings))

    def encode(self, x: Tensor) -> Tensor:
        """z = scale * mean of E(x): images x (B, 3, H, W) in [-1, 1] to float32 latents (B, 4, H/8, W/8)."""
        return self.scaled(self.posterior(x))

    def posterior(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of E(x), concatenated: images x (B, 3, H, W) in [-1, 1] to (B, 8, H/8, W/8).

        Not multiplied by the VAE's scaling factor.
        """
        distribution = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1)

    def scaled(self, posterior: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of a posterior: z = scale * (mean + deviation * noise), float32 latents (B, 4, h, w).

        posterior: (B, 8, h, w), as `posterior` returns it. noise: unit noise (B, 4, h, w); None for the mode, 0.
        """
        mean, std = posterior.chunk(2, dim=1)
        z = mean if noise is None else mean + std * noise.to(std)
        return z.float() * self.vae.config["scaling_factor"]

    def decode(self, z: Tensor) -> Tensor:
        """x = D(z / scale): latents z (B, 4, h, w) to float32 images (B, 3, 8h, 8w), nominally in [-1, 1]."""
        return self.vae.decode(self._unscaled(z)).sample.float()

    def decoding(self) -> list[Callable[[Tensor], Tensor]]:
        """`decode` as a chain of functions, the decoder's layers; each takes the output of the previous one."""
        vae, decoder = self.vae, self.vae.decoder
        prepare = vae.post_quant_conv if vae.post_quant_conv is not None else nn.Identity()
        blocks = [layer for block in decoder.up_blocks for layer in (*block.resnets, *(block.upsamplers or ()))]
        return [
            lambda z: decoder.conv_in(prepare(self._unscaled(z))),
            decoder.mid_block,
            *(partial(layer, temb=None) if isinstance(layer, ResnetBlock2D) else layer for layer in blocks),
            lambda x: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x))).float(),
        ]

    def _unscaled(self, z: Tensor) -> Tensor:
        return (z / self.vae.config["scaling_factor"]).to(self.vae.dtype)
