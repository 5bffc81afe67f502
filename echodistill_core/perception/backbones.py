"""The frozen backbones: network, input size, normalisation and features of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from ..registry import Registry

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def vit_features(model: nn.Module, x: Tensor) -> Tensor:
    """The class token (B, d) of the last layer, after its norm. x: prepared images (B, 3, size, size)."""
    return model(x).last_hidden_state[:, 0]


def _image_embedding(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).image_embeds


def _clip_image_features(model: nn.Module, x: Tensor) -> Tensor:
    pooled = model.vision_model(x).pooler_output  # type: ignore[operator]
    return model.visual_projection(pooled)  # type: ignore[operator]


def vit(config: ViTConfig) -> ViTModel:
    """A ViT without a pooling layer, as DINO."""
    return ViTModel(config, add_pooling_layer=False)


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone: its network, its input and its features. Register it in `SPECS` under `name`.

    title: the published model's name, for messages. size: side of the square input in pixels. mean, std: of the
    training images in [0, 1], per channel. build: from `config` to a transformers model without weights; the
    configuration has `hidden_size`. features: from the model and prepared images (B, 3, size, size) to (B, d).
    projector: arguments of diffusers' ImageProjection (IP-Adapter) that follows the encoder, or None.
    file_names: a regular expression, case ignored, of the names under which the weights are usually distributed. Of
    several files that fit, those are tried first. other_trainings: the same for models with equal tensor names and
    shapes and other weights, such as CLIP trained on another data set; a file so named is not taken.
    """

    name: str
    title: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    build: Callable[[Any], nn.Module]
    config: Any
    features: Callable[[nn.Module, Tensor], Tensor]
    projector: dict[str, int] | None = None
    file_names: str = ""
    other_trainings: str = ""


def _spec(
    name: str, title: str, size: int, statistics: Any, build: Any, config: Any, features: Any, **more: Any
) -> BackboneSpec:
    mean, std = statistics
    return BackboneSpec(name, title, size, mean, std, build, config, features, **more)


def _registry(*specs: BackboneSpec) -> Registry[BackboneSpec]:
    # A critic's head is an entry of an nn.ModuleDict, whose attributes cannot be names.
    known = {spec.name: spec for spec in specs}
    return Registry("backbone", known, pattern="[A-Za-z0-9-]+", reserved=dir(nn.ModuleDict()))


def _clip_with_projector(title: str, config: CLIPVisionConfig, width: int, **more: Any) -> BackboneSpec:
    """CLIP's image encoder with IP-Adapter's projector of its embedding to four tokens of this width."""
    projector = {"image_embed_dim": config.projection_dim, "cross_attention_dim": width, "num_image_text_embeds": 4}
    encoder = CLIPVisionModelWithProjection
    return _spec("clip", title, config.image_size, CLIP, encoder, config, _image_embedding, projector=projector, **more)


def _clip_model(vision: dict[str, Any], text: dict[str, Any], projection: int) -> CLIPConfig:
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)


def _dinov2(width: int, layers: int, heads: int) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14
    )


# Data sets and variants in the names of CLIP checkpoints that OpenAI did not train.
_NOT_OPENAI = r"laion|datacomp|commonpool|metaclip|dfn|yfcc|cc12m|roberta|quilt|streetclip|fashion"

# Published backbones, by the name that a setting or a download uses.
SPECS = _registry(
    _spec(
        "dino",
        "DINO v1 ViT-S/16",
        224,
        IMAGENET,
        vit,
        ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
        vit_features,
        file_names=r"dino[-_]?(v1[-_])?(deit)?(vit)?s(mall)?[-_]?16|vit_small_patch16_224[._]dino",
        other_trainings=r"augreg|deit_|deit3|moco|msn|ibot|[-_.]mae|in21k",
    ),
    _spec(
        "dinov2",
        "DINO v2 ViT-L/14",
        518,
        IMAGENET,
        Dinov2Model,
        _dinov2(1024, 24, 16),
        vit_features,
        file_names=r"dino_?v2.*(large|vitl|_l)|vit_large_patch14_dinov2",
        other_trainings=r"depth_?anything",
    ),
    _spec(
        "dinov2-small",
        "DINO v2 ViT-S/14",
        224,
        IMAGENET,
        Dinov2Model,
        _dinov2(384, 12, 6),
        vit_features,
        file_names=r"dino_?v2.*(small|vits|_s)|vit_small_patch14_dinov2",
        other_trainings=r"depth_?anything",
    ),
    _clip_with_projector(
        "CLIP ViT-H/14 with IP-Adapter's projector",
        CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            image_size=224,
            hidden_act="gelu",
            projection_dim=1024,
        ),
        width=768,
        file_names=r"vit[-_]?h([-_/]?14)?|clip_vision_h|sd15.*image_encoder",
        other_trainings=r"dfn|metaclip|datacomp|quickgelu|cc12m",
    ),
    _spec(
        "clip-vit-l-14-336",
        "OpenAI CLIP ViT-L/14@336 (metrics)",
        336,
        CLIP,
        CLIPModel,
        _clip_model(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 336,
            },
            {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            768,
        ),
        _clip_image_features,
        file_names=r"(vit[-_]?l(arge)?|large)[-_]?(patch)?14.*336",
        other_trainings=_NOT_OPENAI,
    ),
    _spec(
        "clip-vit-b-32",
        "OpenAI CLIP ViT-B/32 (metrics)",
        224,
        CLIP,
        CLIPModel,
        _clip_model({}, {}, 512),
        _clip_image_features,
        file_names=r"(vit[-_]?b(ase)?|base)[-_]?(patch)?32",
        other_trainings=_NOT_OPENAI,
    ),
)

# The same kinds of networks with a few thousand random parameters, for tests.
_TINY_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
TINY_SPECS = _registry(
    _spec("dino", "tiny random ViT", 32, IMAGENET, vit, ViTConfig(**_TINY_VIT, intermediate_size=64), vit_features),
    _spec("dinov2", "tiny random DINO v2", 32, IMAGENET, Dinov2Model, Dinov2Config(**_TINY_VIT), vit_features),
    _spec("dinov2-small", "tiny random DINO v2", 32, IMAGENET, Dinov2Model, Dinov2Config(**_TINY_VIT), vit_features),
    _clip_with_projector(
        "tiny random CLIP with projector",
        CLIPVisionConfig(**_TINY_VIT, intermediate_size=64, projection_dim=32, hidden_act="gelu"),
        width=16,
    ),
)

# The embedded family's backbones, for images of 64 x 64 pixels.
_MINIATURE_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 64,
}
MINIATURE_SPECS = _registry(
    _spec(
        "dino",
        "the miniature's DINO v1",
        64,
        IMAGENET,
        vit,
        ViTConfig(**_MINIATURE_VIT, num_hidden_layers=4, intermediate_size=256),
        vit_features,
    ),
    _spec(
        "dinov2",
        "the miniature's DINO v2",
        64,
        IMAGENET,
        Dinov2Model,
        Dinov2Config(**_MINIATURE_VIT, num_hidden_layers=4),
        vit_features,
    ),
    _clip_with_projector(
        "the miniature's CLIP with projector",
        CLIPVisionConfig(
            **_MINIATURE_VIT, num_hidden_layers=3, intermediate_size=256, projection_dim=64, hidden_act="gelu"
        ),
        width=32,
    ),
)


class Backbone(nn.Module):
    """A frozen image encoder: images to features (B, d), differentiable with respect to the images.

    With a projector, d is tokens * width, and the method `tokens` reshapes features to (B, tokens, width).
    """

    def __init__(self, spec: BackboneSpec, encoder: nn.Module, projector: ImageProjection | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder
        self.projector = projector
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """d, the number of features per image."""
        if self.spec.projector is not None:
            return self.spec.projector["cross_attention_dim"] * self.spec.projector["num_image_text_embeds"]
        if isinstance(self.spec.config, CLIPConfig):
            return int(self.spec.config.projection_dim)
        return int(self.spec.config.hidden_size)

    def forward(self, x: Tensor, normalise: bool = True) -> Tensor:
        """Features (B, d), float32, of images (B, 3, H, W) in [-1, 1].

        normalise: map the images to [0, 1], subtract the backbone's mean and divide by its standard deviation; False
        leaves them in [-1, 1]. Either way, they are resized to the backbone's input size.
        """
        dtype = next(self.encoder.parameters()).dtype
        features = self.spec.features(self.encoder, prepare(x, self.spec, normalise).to(dtype))
        if self.projector is not None:
            features = self.projector(features).flatten(1)
        return features.float()

    def tokens(self, features: Tensor) -> Tensor:
        """Features (B, d) as (B, tokens, width); one token without a projector."""
        count = 1 if self.spec.projector is None else self.spec.projector["num_image_text_embeds"]
        return features.unflatten(1, (count, -1))


def new_backbone(spec: BackboneSpec) -> Backbone:
    """A backbone with random initial weights, drawn from torch's global generator."""
    projector = None if spec.projector is None else ImageProjection(**spec.projector)
    return Backbone(spec, spec.build(spec.config), projector)


def prepare(x: Tensor, spec: BackboneSpec, normalise: bool) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], resized to the backbone's input size, and normalised if `normalise`."""
    return normalised(x, spec.size, (spec.mean, spec.std)) if normalise else resized(x, spec.size)


def resized(x: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) as (B, 3, size, size), by bicubic interpolation with antialiasing, as the models' own
    preprocessing does.
    """
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def normalised(x: Tensor, size: int, statistics: Statistics) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], resized, mapped to [0, 1], and normalised: (B, 3, size, size).

    statistics: mean and standard deviation of each channel.
    """
    channels = ((resized(x, size) + 1) / 2).unbind(1)
    # Python numbers instead of tensors, which would have to be copied to the GPU and block the host.
    return torch.stack([(c - mean) / std for c, mean, std in zip(channels, *statistics, strict=True)], dim=1)
