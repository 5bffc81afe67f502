"""A family: teacher, student and what they share, each with the noise schedule it predicts under."""

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
    """A UNet and the schedule it predicts under.

    fingerprint: of its cross-attention keys and values as they were loaded; two files of one model share it.
    origin: where it came from, for messages and metadata. licence: of the checkpoint, as far as it is known.
    """

    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    fingerprint: str
    origin: str
    licence: str = "unknown"

    def predict(self, zt: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """The UNet's prediction for latents (B, 4, h, w) at timesteps (B,) under the conditioning of B prompts.

        Returns float32, for the algebra that follows: the one-step map amplifies what is rounded there 15 times.
        """
        dtype = self.unet.conv_in.weight.dtype
        out = self.unet(
            zt.to(dtype), t, encoder_hidden_states=text.features.to(dtype), added_cond_kwargs=text.added_conditions
        )
        return out.sample.float()


@dataclass
class Family:
    """Everything a run needs of pretrained models.

    teacher is None where none was asked for (sampling, baselines without a teacher).
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
    on_restore: list[Callable[[], None]] = field(default_factory=list, repr=False)  # what else a run has to undo
    _blocks: dict[str, dict[str, str]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        # The tensors as they were loaded, by network and name: `restore` gives them back after a run has moved, cast
        # and trained. They are references; those of a file are pages that the system can drop.
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
        """Pixels per latent on a side: 8 for every Stable Diffusion VAE."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: 4 for every Stable Diffusion VAE."""
        return int(self.vae.config["latent_channels"])

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.unet.conv_in.weight.device

    def networks(self) -> dict[str, nn.Module]:
        """Every network of the family: "student", "teacher" where there is one, "text", "vae"."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.unet}
        return {"student": self.student.unet, **teacher, "text": self.text.model, "vae": self.vae}

    def blocks(self, role: str) -> dict[str, str]:
        """The fingerprint of each block of a role's UNet as it was loaded; computed once."""
        if role not in self._blocks:
            self._blocks[role] = block_fingerprints(self.loaded[role])
        return self._blocks[role]

    def weights_fingerprint(self, network: str) -> str:
        """The sampled fingerprint of a network, by its name in `networks`, as it was loaded."""
        return sampled_fingerprint(self.loaded[network])

    def freeze(self) -> Family:
        """Switch to evaluation and turn every gradient off; training then asks for what it trains."""
        for module in self.networks().values():
            module.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Family:
        """Move and cast every network in place."""
        for module in self.networks().values():
            # Past diffusers' own `to`, which warns of modules to be kept in float32 even where there are none.
            nn.Module.to(module, device=device, dtype=dtype)
        return self

    def restore(self) -> Family:
        """Undo all that `to` and training did: the very tensors that were loaded, frozen, and no placeholders."""
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
        """tau(y): the conditioning of B prompts. A family of two text encoders joins their features here.

        token_embeddings: the placeholders' (n, width), as TextEncoder.forward takes them and with the same errors.
        """
        return TextConditioning(self.text(prompts, token_embeddings))

    def encode(self, x: Tensor) -> Tensor:
        """z = scale * mean of E(x): images (B, 3, H, W) in [-1, 1] to float32 latents (B, 4, H/8, W/8)."""
        return self.scaled(self.posterior(x))

    def posterior(self, x: Tensor) -> Tensor:
        """Mean and deviation of E(x), not scaled, beside each other: images (B, 3, H, W) to (B, 8, H/8, W/8)."""
        found = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return torch.cat([found.mean, found.std], dim=1)

    def scaled(self, posterior: Tensor, noise: Tensor | None = None) -> Tensor:
        """z = scale * (mean + deviation * noise), float32 latents (B, 4, h, w), of what `posterior` returns.

        noise: unit noise (B, 4, h, w); None takes the posterior's mode.
        """
        mean, std = posterior.chunk(2, dim=1)
        z = mean if noise is None else mean + std * noise.to(std)
        return z.float() * self.vae.config["scaling_factor"]

    def decode(self, z: Tensor) -> Tensor:
        """x = D(z / scale): latents (B, 4, h, w) to float32 images (B, 3, 8h, 8w), nominally in [-1, 1]."""
        return self.vae.decode(self._unscaled(z)).sample.float()

    def decoding(self) -> list[Callable[[Tensor], Tensor]]:
        """`decode` as a chain of functions, each of what the one before it returns: the decoder's layers."""
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
