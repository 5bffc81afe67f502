"""Trains the miniature's image encoders: three frozen backbones for critics and identity, and the judges.

Each backbone has a training objective like that of the published model:

    dino     contrastive, positives are two crops of one image (no labels)
    dinov2   contrastive, positives are two images of one subject (curated pairs, no labels)
    clip     contrastive, positives are an image and its caption

The judges have other sizes, other training images and other seeds; their images include the held-out pairs of colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, ResNetForImageClassification

from ...perception.backbones import CLIP, IMAGENET, MINIATURE_SPECS, Backbone, new_backbone, normalised, prepare
from ..judges import ATTRIBUTES, IDENTITY, attributes_config, image_text_config, split_logits
from ..tokens import reduced_tokenizer
from ..world import caption
from .data import CaptionedImages
from .stage import Losses, adam, optimizer_step, precision, train

BATCH = 128
LEARNING_RATE = 2e-3
TEMPERATURE = 0.1
TEXT_WIDTH = 48
CAPTIONS = 4  # per training image of the image-text judge
JUDGED_DETAIL = 0.4


class ImageText(nn.Module):
    """An image encoder with the text encoder of its contrastive training."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        width = int(backbone.spec.config.projection_dim)
        vocabulary = reduced_tokenizer()
        self.text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=width,
                bos_token_id=vocabulary.bos_token_id,
                eos_token_id=vocabulary.eos_token_id,
                pad_token_id=vocabulary.pad_token_id,
            )
        )
        self.from_tokens = nn.Linear(backbone.width, width)


def train_backbone(
    name: str, path: Path, data: CaptionedImages, steps: int, seed: int, device: torch.device
) -> Backbone:
    """Train the backbone "dino", "dinov2" or "clip" on pairs of images; see `train`."""
    torch.manual_seed(seed)
    backbone = new_backbone(MINIATURE_SPECS[name]).to(device).requires_grad_(True)
    if name == "clip":
        return _train_clip(ImageText(backbone).to(device), path, data, steps, seed, device)
    return train_identity(backbone, path, data, steps, seed, device, same_picture=name == "dino")


def train_identity(
    backbone: Backbone,
    path: Path,
    data: CaptionedImages,
    steps: int,
    seed: int,
    device: torch.device,
    *,
    same_picture: bool,
) -> Backbone:
    """Contrastive learning (SimCLR's NT-Xent) on two crops of one image, or on two images of one subject."""
    optimizer = adam([backbone], LEARNING_RATE)

    def step(number: int, generator: torch.Generator) -> Losses:
        index = 2 * torch.randint(len(data.captions) // 2, (BATCH,), generator=generator)
        first = data.batch(index, device)
        second = first if same_picture else data.batch(index + 1, device)
        smallest = 0.55 if same_picture else 0.75
        with precision(device):
            a = backbone(crops(first, generator, smallest))
            b = backbone(crops(second, generator, smallest))
        loss = nt_xent(a, b, TEMPERATURE)
        optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    average = train(path, backbone, {"backbone": optimizer}, step, steps=steps, seed=seed)
    assert isinstance(average, Backbone)
    return average


def _train_clip(
    model: ImageText, path: Path, data: CaptionedImages, steps: int, seed: int, device: torch.device
) -> Backbone:
    ids = clip_ids(data.captions)
    for network in (model.backbone.encoder, model.text):
        network.set_attn_implementation("eager")  # type: ignore[operator]
    optimizer = adam([model], LEARNING_RATE)

    def step(number: int, generator: torch.Generator) -> Losses:
        index = torch.randint(len(data.captions), (BATCH,), generator=generator)
        with precision(device):
            text = model.text(ids[index].to(device)).text_embeds
            x = crops(data.batch(index, device), generator, 0.8)
            image = model.backbone.encoder(prepare(x, model.backbone.spec, True)).image_embeds
            assert model.backbone.projector is not None
            tokens = model.from_tokens(model.backbone.projector(image).flatten(1))
        loss = contrastive(image.float(), text.float()) + contrastive(tokens.float(), text.float())
        optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    average = train(path, model, {"clip": optimizer}, step, steps=steps, seed=seed)
    assert isinstance(average, ImageText)
    return average.backbone


def train_judge_clip(path: Path, data: CaptionedImages, steps: int, seed: int, device: torch.device) -> CLIPModel:
    """Train the image-text judge; see `train`."""
    torch.manual_seed(seed)
    model = CLIPModel(image_text_config()).to(device)
    model.set_attn_implementation("eager")
    # Evaluation prompts name only the class more often than the pretraining captions do.
    rng = np.random.default_rng(seed)
    captions = [[caption(scene, rng, detail=JUDGED_DETAIL) for scene in data.scenes] for _ in range(CAPTIONS)]
    ids = torch.stack([clip_ids(some) for some in captions])
    optimizer = adam([model], LEARNING_RATE)

    def step(number: int, generator: torch.Generator) -> Losses:
        index = torch.randint(len(data.scenes), (BATCH,), generator=generator)
        which = torch.randint(CAPTIONS, (BATCH,), generator=generator)
        x = degrade(crops(data.batch(index, device), generator, 0.8), generator)
        with precision(device):
            out = model(pixel_values=normalised(x, 64, CLIP), input_ids=ids[which, index].to(device))
        loss = contrastive(out.image_embeds.float(), out.text_embeds.float())
        optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    average = train(path, model, {"clip": optimizer}, step, steps=steps, seed=seed)
    assert isinstance(average, CLIPModel)
    return average


def train_judge_attributes(
    path: Path, data: CaptionedImages, steps: int, seed: int, device: torch.device
) -> ResNetForImageClassification:
    """Train the classifier of shape, colours, pattern, emblem and context; see `train`."""
    torch.manual_seed(seed)
    model = ResNetForImageClassification(attributes_config()).to(device)
    labels = {
        name: torch.tensor([values.index(read(scene)) for scene in data.scenes])
        for name, (values, read) in ATTRIBUTES.items()
    }
    optimizer = adam([model], LEARNING_RATE)

    def step(number: int, generator: torch.Generator) -> Losses:
        index = torch.randint(len(data.captions), (BATCH,), generator=generator)
        x = degrade(crops(data.batch(index, device), generator, 0.85), generator)
        with precision(device):
            logits = split_logits(model(normalised(x, 64, IMAGENET)).logits)
        losses = {name: F.cross_entropy(logits[name].float(), labels[name][index].to(device)) for name in labels}
        optimizer_step(torch.stack(list(losses.values())).sum(), optimizer)
        return {name: loss.detach() for name, loss in losses.items()}

    model.train()
    average = train(path, model, {"resnet": optimizer}, step, steps=steps, seed=seed)
    assert isinstance(average, ResNetForImageClassification)
    return average


def clip_ids(captions: list[str]) -> Tensor:
    """Token ids (N, 77) of the reduced tokenizer."""
    return reduced_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def crops(x: Tensor, generator: torch.Generator, smallest: float) -> Tensor:
    """Random square crops, `smallest` to 1 of the side, resized back; half are mirrored."""
    count = len(x)
    scale = smallest + (1 - smallest) * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False).to(x.device)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Add blur and noise to a random half of the images, so that judges generalise to generated images."""
    chosen = (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5).to(x.device)
    side = x.shape[-1]
    coarse = int(torch.randint(side // 2, side, (1,), generator=generator))
    blurred = F.interpolate(x, size=coarse, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(blurred, size=side, mode="bicubic", align_corners=False)
    amount = 0.08 * torch.rand(len(x), 1, 1, 1, generator=generator)
    noise = (torch.randn(x.shape, generator=generator) * amount).to(x.device)
    return torch.where(chosen, blurred + noise, x)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, Eq. 1) of features (B, d) with matching rows; a scalar."""
    features = F.normalize(torch.cat([a, b]).float(), dim=1)
    logits = features @ features.T / temperature
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), float("-inf"))
    count = len(a)
    target = torch.arange(2 * count, device=logits.device).roll(count)
    return F.cross_entropy(logits, target)


def contrastive(image: Tensor, text: Tensor, temperature: float = 0.07) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021) of embeddings (B, d) with matching rows; a scalar."""
    logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_judge_identity(path: Path, data: CaptionedImages, steps: int, seed: int, device: torch.device) -> Backbone:
    """Train the identity judge on pairs of images of one subject; see `train`."""
    torch.manual_seed(seed)
    backbone = new_backbone(IDENTITY).to(device).requires_grad_(True)
    return train_identity(backbone, path, data, steps, seed, device, same_picture=False)
