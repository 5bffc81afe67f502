"""CLIP-T, CLIP-I, DINO, diversity and attribute accuracy as pure functions of features, and the evaluation protocols.

Features need no normalisation: all metrics use cosines. Results are Python numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Protocol:
    """The encoders of the metrics and their preprocessing. Scores of different protocols are not comparable.

    clip, dino: names in `perception.backbones.SPECS`, or of the miniature's judges.
    clip_size, dino_size: side in pixels of the encoder's square input.
    squash: side in pixels of the square that images are first resized to without cropping; 0 skips this step.
    """

    name: str
    title: str
    clip: str
    dino: str
    clip_size: int
    dino_size: int
    squash: int


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "authors",
            "the authors': CLIP ViT-L/14@336, and DINO v2 ViT-L/14 under the name of DINO",
            clip="clip-vit-l-14-336",
            dino="dinov2",
            clip_size=336,
            dino_size=224,
            squash=512,
        ),
        Protocol(
            "dreambooth",
            "DreamBooth's: CLIP ViT-B/32 and DINO v1 ViT-S/16",
            clip="clip-vit-b-32",
            dino="dino",
            clip_size=224,
            dino_size=224,
            squash=0,
        ),
        Protocol(
            "miniature",
            "the miniature's judges, which share nothing with the critics",
            clip="image_text",
            dino="identity",
            clip_size=64,
            dino_size=64,
            squash=0,
        ),
    )
}


def clip_t(image_features: Tensor, text_features: Tensor) -> float:
    """Prompt fidelity in [-1, 1]: mean cosine of each image (B, d) with its own prompt (B, d).

    The prompts are those of `concept.prompts.without_placeholder`, since the encoder does not know the placeholder.
    Raises InputError where the numbers of images and prompts differ or are 0.
    """
    _check("image", image_features)
    if image_features.shape != text_features.shape:
        raise InputError(
            f"CLIP-T got features {tuple(image_features.shape)} of images and {tuple(text_features.shape)} of "
            "prompts; expected the same shape, one prompt for each image."
        )
    return float(F.cosine_similarity(image_features.float(), text_features.float(), dim=1).mean())


def clip_i(generated: Tensor, references: Tensor) -> float:
    """Subject fidelity in [-1, 1] by CLIP: mean cosine over all pairs of generated (N, d) and reference (M, d).

    Raises InputError where either is empty or the widths differ.
    """
    return _mean_cosine(generated, references)


def dino(generated: Tensor, references: Tensor) -> float:
    """Subject fidelity in [-1, 1] by a self-supervised encoder: as `clip_i`, with features (N, d) and (M, d).

    Raises InputError where either is empty or the widths differ.
    """
    return _mean_cosine(generated, references)


def diversity(features_by_prompt: Tensor) -> float:
    """Diversity in [0, 2] of samples of one prompt: mean over prompts of 1 - mean cosine of its pairs of samples.

    features_by_prompt (P, S, d): S samples of P prompts, from S noises. This is DreamBooth's DIV (Ruiz et al. 2023,
    section 4.3), with cosine distances of features in place of LPIPS. 0 means that all noises give the same image.
    Raises InputError where there is no prompt or only one sample of each.
    """
    if features_by_prompt.ndim != 3 or features_by_prompt.shape[0] < 1 or features_by_prompt.shape[1] < 2:
        raise InputError(
            f"diversity got features {tuple(features_by_prompt.shape)}; expected (prompts, samples, d) with at least "
            "two samples of each prompt."
        )
    unit = F.normalize(features_by_prompt.double(), dim=-1)
    samples = unit.shape[1]
    cosines = unit @ unit.transpose(1, 2)
    # Without the diagonal: the cosine of each sample with itself.
    pairs = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return float((1 - pairs / (samples * (samples - 1))).mean())


def attribute_accuracy(predicted: Mapping[str, Tensor], truth: Mapping[str, int], names: Sequence[str]) -> float:
    """Share in [0, 1] of the named attributes that are predicted correctly, over all images.

    predicted: attribute -> predicted indices (B,), long. truth: attribute -> the correct index. "color" and "second"
    named together are an unordered pair, because mirroring an image swaps them: each image is scored in the order with
    more correct colours, and each of the two colours counts as one attribute.
    Raises InputError for no names, no images, and names that are missing in `predicted` or `truth`.
    """
    for name in names:
        if name not in predicted or name not in truth:
            where = "predictions" if name not in predicted else "truth"
            raise InputError(f"the attribute '{name}' is not in the {where}; the predictions have {sorted(predicted)}.")
    if not names or predicted[names[0]].numel() == 0:
        raise InputError("attribute accuracy got no attributes or no images; expected at least one of each.")
    rest = [name for name in names if not ({"color", "second"} <= set(names) and name in ("color", "second"))]
    right = [(predicted[name] == truth[name]).double() for name in rest]
    if len(rest) < len(names):
        first, second = predicted["color"], predicted["second"]
        straight = (first == truth["color"]).double() + (second == truth["second"])
        crossed = (first == truth["second"]).double() + (second == truth["color"])
        right.append(torch.maximum(straight, crossed))
    return float(torch.stack(right).sum(0).mean() / len(names))


def _mean_cosine(generated: Tensor, references: Tensor) -> float:
    _check("generated", generated)
    _check("reference", references)
    if generated.shape[1] != references.shape[1]:
        raise InputError(
            f"generated images have {generated.shape[1]} features and references {references.shape[1]}; "
            "expected features of the same encoder."
        )
    unit, others = (F.normalize(x.double(), dim=1) for x in (generated, references))
    return float((unit @ others.T).mean())


def _check(kind: str, features: Tensor) -> None:
    if features.ndim != 2 or features.shape[0] == 0:
        raise InputError(f"the {kind} features have shape {tuple(features.shape)}; expected (images, d), not empty.")
