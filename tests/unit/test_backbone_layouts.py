"""Encoders in OpenCLIP's, timm's and Meta's layouts against open_clip and timm themselves, with random weights.

Widths are the true ones and depths reduced. ECHODISTILL_FULL_SIZE=1 adds the true depths: 8 GB of memory, some minutes.
"""

import copy
import dataclasses
import json
import os
import shutil
from functools import lru_cache

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

from echodistill_core.concept.photographs import load_photographs
from echodistill_core.errors import InputError
from echodistill_core.evaluation.metrics import PROTOCOLS
from echodistill_core.evaluation.pictures import score_pictures
from echodistill_core.perception import load
from echodistill_core.perception.backbones import SPECS
from echodistill_core.perception.load import BackboneFiles, load_backbone

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


@lru_cache(maxsize=2)
def open_clip_model(name, depth=DEPTH, kind=CLIP):
    model, quick = OPEN_CLIP[name]
    config = copy.deepcopy(open_clip.get_model_config(model))
    config["vision_cfg"]["layers"] = depth or config["vision_cfg"]["layers"]
    config["text_cfg"]["layers"] = depth or config["text_cfg"]["layers"]
    if name == "clip":  # whose text encoder nobody reads
        config["text_cfg"]["vocab_size"] = 64
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return randomised(kind(config["embed_dim"], vision, text, quick_gelu=quick))


@lru_cache(maxsize=2)
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
    return dataclasses.replace(spec, config=config, projector=None)


@pytest.fixture(autouse=True)
def no_files_left(tmp_path):
    """pytest keeps the folders of three runs, and these files are large."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


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
    """The largest difference, as a part of the largest feature."""
    assert found.shape == expected.shape
    assert expected.std() > 0
    return float((found - expected).abs().max() / expected.abs().max())


def text_features(backbone, ids):
    """As evaluation.pictures computes them."""
    clip = backbone.encoder
    return clip.text_projection(clip.text_model(ids).pooler_output)


def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a photo of a dog", "two red cups, on snow"])


# Features


def check_open_clip(name, model, path):
    backbone = load_backbone(name, saved(model.state_dict(), path))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    x = pictures(encoder_side(name))[:1]
    errors = [error_of(features(backbone, x), model.encode_image(x))]
    if name != "clip":
        errors.append(error_of(text_features(backbone, tokens()), model.encode_text(tokens())))
    print(name, errors)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_open_clips_layout_gives_open_clips_features(tmp_path, shallow, name):
    check_open_clip(name, open_clip_model(name), tmp_path / "open_clip_model.safetensors")


@full_size
@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_open_clips_layout_gives_open_clips_features_at_the_true_depth(tmp_path, monkeypatch, name):
    monkeypatch.setattr(load, "SPECS", {name: dataclasses.replace(SPECS[name], projector=None)})
    check_open_clip(name, open_clip_model(name, depth=None), tmp_path / "open_clip_model.safetensors")


def check_timm(name, model, path):
    backbone = load_backbone(name, saved(model.state_dict(), path))
    x = pictures(encoder_side(name))[:1]
    error = error_of(features(backbone, x), model(x))
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


def as_meta_names(tensors):
    """timm's tensors as Meta's repositories publish DINO v2's."""
    return {**tensors, "mask_token": torch.ones(1, tensors["cls_token"].shape[-1])}


def as_meta_trains(tensors):
    """As a training checkpoint of DINO v2 has them: blocks in groups, the teacher beside the student, and heads."""
    grouped = {}
    for name, tensor in as_meta_names(tensors).items():
        parts = name.split(".")
        grouped[".".join(["blocks", "0", *parts[1:]] if parts[0] == "blocks" else parts)] = tensor
    heads = {f"{role}.dino_head.mlp.0.weight": torch.zeros(4, 384) for role in ("teacher", "student")}
    return (
        {f"student.backbone.{n}": torch.zeros_like(t) for n, t in grouped.items()}
        | {f"teacher.backbone.{n}": t for n, t in grouped.items()}
        | heads
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("dinov2-small", as_meta_names),
        ("dinov2-small", as_meta_trains),
        ("dino", lambda tensors: {f"module.backbone.{n}": t for n, t in tensors.items()}),
        ("dino", lambda tensors: {f"teacher.{n}": t for n, t in tensors.items()}),
    ],
    ids=["published", "training checkpoint", "in a module", "teacher alone"],
)
def test_metas_layouts_give_timms_features(tmp_path, shallow, name, written):
    model = timm_model(name)
    backbone = load_backbone(name, saved(written(model.state_dict()), tmp_path / "meta.safetensors"))
    x = pictures(encoder_side(name))[:1]
    assert error_of(features(backbone, x), model(x)) < 1e-5


def test_open_clips_text_encoder_may_be_a_module_of_its_own(tmp_path, shallow):
    model = open_clip_model("clip-vit-b-32", kind=CustomTextCLIP)
    assert "text.token_embedding.weight" in model.state_dict()
    backbone = load_backbone("clip-vit-b-32", saved(model.state_dict(), tmp_path / "own.safetensors"))
    assert error_of(text_features(backbone, tokens()), model.encode_text(tokens())) < 1e-5


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_with_single_precision_norms_is_half(tmp_path, shallow, precision):
    """As OpenCLIP saves a network that it trained in half precision."""
    model = open_clip_model("clip-vit-b-32")
    tensors = {n: t if "ln_" in n else t.to(precision) for n, t in model.state_dict().items()}
    backbone = load_backbone("clip-vit-b-32", saved(tensors, tmp_path / "half.safetensors"))
    assert {p.dtype for p in backbone.parameters()} == {precision}
    x = pictures(224)
    assert error_of(backbone(x, normalise=False), model.encode_image(x)) < 0.1


def test_comfyuis_vision_files_in_transformers_layout_load_as_before(tmp_path, shallow):
    """vision_model.* and visual_projection.weight, and what is left of a whole CLIP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = randomised(CLIPVisionModelWithProjection(shallow["clip"].config))
    tensors = {**model.state_dict(), "logit_scale": torch.tensor(4.6)}
    x = pictures(224)
    for extra in ({}, {"vision_model.embeddings.position_ids": torch.arange(257)[None]}):
        backbone = load_backbone("clip", saved(tensors | extra, tmp_path / "clip_vision_h.safetensors"))
        assert torch.equal(features(backbone, x), model(x).image_embeds)


def test_gradients_pass_through_a_converted_encoder_as_through_open_clips(tmp_path, shallow):
    model = open_clip_model("clip-vit-b-32")
    backbone = load_backbone("clip-vit-b-32", saved(model.state_dict(), tmp_path / "b.safetensors"))
    weights = torch.linspace(-1, 1, 512)
    gradients = []
    for encode in (lambda x: features(backbone, x), model.encode_image):
        x = pictures(224).requires_grad_()
        (encode(x) * weights).sum().backward()
        gradients.append(x.grad)
    assert error_of(*gradients) < 1e-4
    assert all(not p.requires_grad for p in backbone.parameters())


def test_dinos_positions_are_interpolated_as_before_where_another_size_is_asked_for(tmp_path, shallow):
    """DINO v2 small at 224 pixels, against timm with positions interpolated by hand from 518."""
    model = timm_model("dinov2-small")
    backbone = load_backbone("dinov2-small", saved(model.state_dict(), tmp_path / "s.safetensors"))
    small = timm_model("dinov2-small", img_size=224)
    grid = model.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
    positions = torch.cat([model.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    small.load_state_dict({**model.state_dict(), "pos_embed": positions})
    x = pictures(224)
    assert error_of(backbone(x, normalise=False), small(x)) < 1e-4


# Folders and scores


def folder_of(path, model, config):
    path.mkdir()
    saved(model.state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return path


def test_a_folder_of_open_clips_says_which_activation_it_was_trained_with(tmp_path, shallow):
    model = open_clip_model("clip-vit-b-32")
    x = pictures(224)
    openai = folder_of(tmp_path / "openai", model, {"quick_gelu": True})
    # As timm publishes OpenAI's: its own image encoder lies beside it under transformers' name.
    saved({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, openai / "model.safetensors")
    assert error_of(load_backbone("clip-vit-b-32", openai)(x, normalise=False), model.encode_image(x)) < 1e-4
    laion = folder_of(tmp_path / "laion", model, {})
    with pytest.raises(InputError, match=r"open_clip_config\.json .*gelu, expected quick_gelu"):
        load_backbone("clip-vit-b-32", laion)


def test_a_folder_of_timms_loads(tmp_path, shallow):
    model = timm_model("dino")
    saved(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224", "num_classes": 0}))
    x = pictures(224)
    assert error_of(load_backbone("dino", tmp_path)(x, normalise=False), model(x)) < 1e-5


def test_scores_by_files_of_open_clip_and_timm_are_those_of_open_clip_and_timm(tmp_path, shallow):
    clip, dino = open_clip_model("clip-vit-b-32"), timm_model("dino")
    backbone_files = {
        "clip-vit-b-32": BackboneFiles(saved(clip.state_dict(), tmp_path / "open_clip_model.safetensors")),
        "dino": BackboneFiles(saved(dino.state_dict(), tmp_path / "vit_small_patch16_224.dino.safetensors")),
    }
    made, real = pictures(224).clamp(-1, 1), pictures(224).flip(0, 3)[:1].clamp(-1, 1)
    path = tmp_path / "photograph.png"
    eight_bits = ((real[0] + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(eight_bits.permute(1, 2, 0).numpy()).save(path)
    photographs = load_photographs([path])
    found = score_pictures(made, photographs, "a <new1> dog", "<new1>", PROTOCOLS["dreambooth"], backbone_files)

    def prepared(x, name):
        mean, std = (torch.tensor(v)[:, None, None] for v in (SPECS[name].mean, SPECS[name].std))
        return ((x + 1) / 2 - mean) / std

    def cosine(a, b):
        return float(torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).mean())

    real = eight_bits[None] / 127.5 - 1
    seen, text = clip.encode_image(prepared(made, "clip-vit-b-32")), open_clip.get_tokenizer("ViT-B-32")(["a dog"])
    assert found["clip_t"] == pytest.approx(cosine(seen, clip.encode_text(text)), abs=1e-4)
    assert found["clip_i"] == pytest.approx(cosine(seen, clip.encode_image(prepared(real, "clip-vit-b-32"))), abs=1e-4)
    assert found["dino"] == pytest.approx(cosine(dino(prepared(made, "dino")), dino(prepared(real, "dino"))), abs=1e-4)


# Bad input


@pytest.mark.parametrize("broken", ["ln_pre", "attn.in_proj_weight", "visual.proj"])
def test_missing_and_misshapen_tensors_of_open_clips_layout_are_refused(tmp_path, shallow, broken):
    whole = open_clip_model("clip-vit-b-32").state_dict()
    names = [n for n in whole if broken in n]
    for tensors in ({n: t for n, t in whole.items() if n not in names}, whole | dict.fromkeys(names, torch.zeros(2))):
        with pytest.raises(InputError, match=r"missing|width of the image embedding . instead of 512"):
            load_backbone("clip-vit-b-32", saved(tensors, tmp_path / "broken.safetensors"))
