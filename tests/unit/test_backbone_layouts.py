"""Encoders in OpenCLIP's, timm's and Meta's layouts against open_clip and timm themselves, with random weights.

Widths are the true ones and depths reduced. ECHODISTILL_FULL_SIZE=1 adds the true depths: 8 GB of memory, some minutes.
"""

import copy
import os

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from echodistill_core.perception import load
from echodistill_core.perception.backbones import SPECS, Spec
from echodistill_core.perception.load import load_backbone

full_size = pytest.mark.skipif(
    not os.environ.get("ECHODISTILL_FULL_SIZE"), reason="ECHODISTILL_FULL_SIZE is not set: it takes 8 GB"
)
DEPTH = 2
# OpenCLIP's own name of each CLIP, and whether it was trained with QuickGELU.
OPEN_CLIP = {
    "clip": ("ViT-H-14", False),
    "clip-vit-l-14-336": ("ViT-L-14-336", True),
    "clip-vit-b-32": ("ViT-B-32", True),
}
TIMM = {
    "dino": "vit_small_patch16_224.dino",
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-small": "vit_small_patch14_dinov2.lvd142m",
}


def randomised(model):
    """Every weight away from where it begins: no zeros, no ones, no two layers alike."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def open_clip_model(name, depth=DEPTH):
    model, quick = OPEN_CLIP[name]
    config = copy.deepcopy(open_clip.get_model_config(model))
    config["vision_cfg"]["layers"] = depth or config["vision_cfg"]["layers"]
    config["text_cfg"]["layers"] = depth or config["text_cfg"]["layers"]
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return randomised(CLIP(config["embed_dim"], vision, text, quick_gelu=quick))


def timm_model(name, depth=DEPTH, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        more = {"depth": depth} if depth else {}
        return randomised(timm.create_model(TIMM[name], pretrained=False, **more, **options))


def reduced(spec, depth=DEPTH):
    """The specification with fewer layers."""
    config = copy.deepcopy(spec.config)
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = depth
    return Spec(spec.name, spec.title, spec.size, spec.mean, spec.std, spec.build, config, spec.features)


@pytest.fixture
def shallow(monkeypatch):
    """The true specifications but for their depth, and without IP-Adapter's projector."""
    specs = {name: reduced(spec) for name, spec in SPECS.items()}
    monkeypatch.setattr(load, "SPECS", specs)
    return specs


def pictures(side):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def encoder_side(name):
    """The size of the position embeddings' grid, at which nothing is interpolated."""
    return {"dinov2": 518, "dinov2-small": 518, "clip-vit-l-14-336": 336}.get(name, 224)


def saved(tensors, path):
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return path


def features(backbone, x):
    return backbone.spec.features(backbone.encoder, x)


def error_of(found, expected):
    """The largest difference, as a part of the features' deviation."""
    assert found.shape == expected.shape
    assert expected.std() > 0
    return float((found - expected).abs().max() / expected.std())


def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a photo of a dog", "two red cups, on snow"])


# Features


def check_open_clip(name, model, path):
    side = encoder_side(name)
    x = pictures(side)[: 1 if side > 224 else 2]
    backbone = load_backbone(name, saved(model.state_dict(), path))
    errors = [error_of(features(backbone, x), model.encode_image(x))]
    if name != "clip":
        ids = tokens()
        clip = backbone.encoder
        errors.append(error_of(clip.text_projection(clip.text_model(ids).pooler_output), model.encode_text(ids)))
    print(name, errors)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_open_clips_layout_gives_open_clips_features(tmp_path, shallow, name):
    check_open_clip(name, open_clip_model(name), tmp_path / "open_clip_model.safetensors")


@full_size
@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_open_clips_layout_gives_open_clips_features_at_the_true_depth(tmp_path, monkeypatch, name):
    true = SPECS[name]
    whole = Spec(name, true.title, true.size, true.mean, true.std, true.build, true.config, true.features)
    monkeypatch.setattr(load, "SPECS", {name: whole})
    check_open_clip(name, open_clip_model(name, depth=None), tmp_path / "open_clip_model.safetensors")


def check_timm(name, model, path):
    x = pictures(encoder_side(name))[:1]
    error = error_of(features(load_backbone(name, saved(model.state_dict(), path)), x), model(x))
    print(name, error)
    assert error < 1e-5


@pytest.mark.parametrize("name", ["dino", "dinov2", "dinov2-small"])
def test_timms_layout_gives_timms_features(tmp_path, shallow, name):
    check_timm(name, timm_model(name), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["dino", pytest.param("dinov2-small", marks=full_size), pytest.param("dinov2", marks=full_size)]
)
def test_timms_layout_gives_timms_features_at_the_true_depth(tmp_path, name):
    check_timm(name, timm_model(name, depth=None), tmp_path / "model.safetensors")
