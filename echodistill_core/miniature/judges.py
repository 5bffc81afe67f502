"""The miniature's judges: encoders and a classifier for evaluation only, never used in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification, ViTConfig

from ..models.embedded import embedded_folder
from ..perception.backbones import CLIP, IMAGENET, Backbone, BackboneSpec, normalised, vit, vit_features
from ..perception.load import load_backbone
from .tokens import reduced_tokenizer
from .world import COLORS, CONTEXTS, EMBLEMS, PATTERNS, SHAPES, Scene

# Attributes of a scene: name -> its values, and a function from a scene to its value.
ATTRIBUTES: dict[str, tuple[list[str], Callable[[Scene], str]]] = {
    "shape": (list(SHAPES), lambda s: s.subject.shape),
    "color": (list(COLORS), lambda s: s.subject.color),
    "second": (list(COLORS), lambda s: s.subject.second),
    "pattern": (list(PATTERNS), lambda s: s.subject.pattern),
    "emblem": (list(EMBLEMS), lambda s: s.subject.emblem),
    "context": (list(CONTEXTS), lambda s: s.context),
}

IDENTITY = BackboneSpec(
    "identity",
    "the judge of identity",
    64,
    *IMAGENET,
    vit,
    ViTConfig(
        hidden_size=80, num_hidden_layers=4, num_attention_heads=5, intermediate_size=320, patch_size=8, image_size=64
    ),
    vit_features,
)


def image_text_config() -> CLIPConfig:
    """Configuration of the image-text judge: a small CLIP with the reduced tokenizer."""
    tokenizer = reduced_tokenizer()
    common = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    return CLIPConfig(
        vision_config={**common, "num_hidden_layers": 4, "patch_size": 8, "image_size": 64},
        text_config={
            **common,
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=64,
    )


def attributes_config() -> ResNetConfig:
    """Configuration of the attribute classifier: a small ResNet with the concatenated logits of all attributes."""
    labels = [f"{name}: {value}" for name, (values, _) in ATTRIBUTES.items() for value in values]
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def indices(attributes: Mapping[str, str]) -> dict[str, int]:
    """Values of attributes ("shape": "mug") as indices into the values in ATTRIBUTES."""
    return {name: ATTRIBUTES[name][0].index(value) for name, value in attributes.items()}


def split_logits(logits: Tensor) -> dict[str, Tensor]:
    """Split logits (B, number of all values) into (B, values) for each attribute."""
    parts = logits.split([len(values) for values, _ in ATTRIBUTES.values()], dim=1)
    return dict(zip(ATTRIBUTES, parts, strict=True))


@dataclass(frozen=True)
class Judges:
    """The judges, frozen. Images are (B, 3, H, W) in [-1, 1]; features are not normalised."""

    identity_encoder: Backbone
    clip: CLIPModel
    classifier: ResNetForImageClassification

    def identity(self, images: Tensor) -> Tensor:
        """Identity features (B, 80), independent of context."""
        with torch.no_grad():
            return self.identity_encoder(images)

    def image_text_image(self, images: Tensor) -> Tensor:
        """Image features (B, 64) in the space shared with text."""
        with torch.no_grad():
            pooled = self.clip.vision_model(normalised(images, 64, CLIP)).pooler_output
            return self.clip.visual_projection(pooled)

    def image_text_text(self, prompts: Sequence[str]) -> Tensor:
        """Text features (B, 64) in the space shared with images."""
        tokens = reduced_tokenizer()(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            pooled = self.clip.text_model(tokens.input_ids.to(self.clip.device)).pooler_output
            return self.clip.text_projection(pooled)

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """The classifier's predictions: attribute -> index (B,) into the values in ATTRIBUTES."""
        with torch.no_grad():
            logits = self.classifier(normalised(images, 64, IMAGENET)).logits
        return {name: part.argmax(1) for name, part in split_logits(logits).items()}


def load_judges() -> Judges:
    """Load the judges of the package, frozen, float32, on the CPU. Raises InputError for damaged files."""
    folder = embedded_folder("judges")
    clip = CLIPModel.from_pretrained(folder / "image_text", dtype=torch.float32, local_files_only=True)
    classifier = ResNetForImageClassification.from_pretrained(
        folder / "attributes", dtype=torch.float32, local_files_only=True
    )
    identity = load_backbone("identity", folder / "identity", specs={"identity": IDENTITY}).float()
    return Judges(identity, clip.eval().requires_grad_(False), classifier.eval().requires_grad_(False))
