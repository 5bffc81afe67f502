"""Which backbone a file is, told from its header: networks of true size by open_clip, timm and transformers.

The files are sparse: a header, and as many zeros as it promises, which take no room on the disk.
"""

import json
import os
import struct
from functools import cache

import open_clip
import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from echodistill_core.perception.backbones import SPECS
from echodistill_core.perception.files import choose, choose_projector, mismatch_reason, rank


def sparse_file(path, shapes):
    """A safetensors file in half precision whose data are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def of_open_clip(name):
    with torch.device("meta"):
        return shapes_of(open_clip.create_model(name, pretrained=None, device="meta"))


@cache
def of_timm(name, **options):
    with torch.device("meta"):
        return shapes_of(timm.create_model(name, pretrained=False, **options))


@cache
def of_transformers(name):
    with torch.device("meta"):
        return shapes_of(SPECS[name].build(SPECS[name].config))


def clip_vision(width, layers, patch=14, projection=1024):
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=16,
        patch_size=patch, projection_dim=projection,
    )  # fmt: skip
    with torch.device("meta"):
        return shapes_of(CLIPVisionModelWithProjection(config))


def siglip():
    with torch.device("meta"):
        return shapes_of(SiglipVisionModel(SiglipVisionConfig(hidden_size=1152, patch_size=14, image_size=384)))


DINO, DINOV2, SMALL = (
    "vit_small_patch16_224.dino",
    "vit_large_patch14_dinov2.lvd142m",
    "vit_small_patch14_dinov2.lvd142m",
)
FILES = {
    "clip_vision_h.safetensors": (lambda: clip_vision(1280, 32), "clip"),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (lambda: of_open_clip("ViT-H-14"), "clip"),
    "open_clip_model.safetensors": (
        lambda: {n: s for n, s in of_open_clip("ViT-H-14").items() if n.startswith("visual.")},
        "clip",
    ),
    "image_encoder.safetensors": (lambda: of_transformers("clip"), "clip"),
    "ViT-H-14-quickgelu/dfn5b.safetensors": (lambda: of_open_clip("ViT-H-14"), None),
    "clip-vit-large-patch14.safetensors": (lambda: of_open_clip("ViT-L-14"), None),
    "clip_vision_l.safetensors": (lambda: clip_vision(1024, 24, projection=768), None),
    "clip_vision_g.safetensors": (lambda: clip_vision(1664, 48, projection=1280), None),
    "RN50.safetensors": (lambda: of_open_clip("RN50"), None),
    "sigclip_vision_patch14_384.safetensors": (siglip, None),
    "clip-vit-large-patch14-336.safetensors": (lambda: of_transformers("clip-vit-l-14-336"), "clip-vit-l-14-336"),
    "ViT-L-14-336px.safetensors": (lambda: of_open_clip("ViT-L-14-336"), "clip-vit-l-14-336"),
    "ViT-B-32.safetensors": (lambda: of_open_clip("ViT-B-32"), "clip-vit-b-32"),
    "CLIP-ViT-B-32-laion2B-s34B-b79K/open_clip_model.safetensors": (lambda: of_open_clip("ViT-B-32"), None),
    "dinov2_vitl14_pretrain.safetensors": (lambda: of_timm(DINOV2) | {"mask_token": (1, 1024)}, "dinov2"),
    f"{DINOV2}.safetensors": (lambda: of_timm(DINOV2), "dinov2"),
    "dinov2-large.safetensors": (lambda: of_transformers("dinov2"), "dinov2"),
    f"{SMALL}.safetensors": (lambda: of_timm(SMALL), "dinov2-small"),
    "dinov2_vits14_reg4_pretrain.safetensors": (lambda: of_timm(SMALL) | {"register_tokens": (1, 4, 384)}, None),
    "dinov2_vitb14_pretrain.safetensors": (lambda: of_timm("vit_base_patch14_dinov2"), None),
    f"{DINO}.safetensors": (lambda: of_timm(DINO), "dino"),
    "dino-vits16.safetensors": (lambda: {f"vit.{n}": s for n, s in of_transformers("dino").items()}, "dino"),
    "dino_deitsmall16_pretrain.safetensors": (lambda: of_timm(DINO), "dino"),
    "dino_vitb16.safetensors": (lambda: of_timm("vit_base_patch16_224.dino"), None),
    "dino_deitsmall8_pretrain.safetensors": (lambda: of_timm("vit_small_patch8_224.dino"), None),
    "vit_small_patch16_224.augreg_in1k.safetensors": (lambda: of_timm("vit_small_patch16_224.augreg_in1k"), None),
    "moco-v3-vits16.safetensors": (lambda: of_timm(DINO), None),
    "lora.safetensors": (lambda: {"lora_down.weight": (4, 320)}, None),
}


@pytest.mark.parametrize("called", list(FILES))
def test_a_file_is_known_by_what_is_in_it(called):
    shapes, name = FILES[called]
    fitting = [each for each, spec in SPECS.items() if not mismatch_reason(shapes(), spec, called)]
    assert fitting[:1] == ([name] if name else [])


@pytest.mark.parametrize("called", [called for called, (_, name) in FILES.items() if name])
def test_usual_names_are_known_and_no_others(called):
    ranks = {name: rank(name, called) for name in SPECS}
    plain = called in ("open_clip_model.safetensors", "image_encoder.safetensors")
    assert {name for name, value in ranks.items() if value} == (set() if plain else {FILES[called][1]})


def candidates(folder):
    return [(p, p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*.safetensors"))]


def test_a_file_of_the_wrong_kind_does_not_hide_the_right_one(tmp_path):
    wrong = sparse_file(tmp_path / "dino-vits16.safetensors", of_timm(SMALL))
    broken = tmp_path / "dino-vits16-copy.safetensors"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    found, reasons = choose("dino", candidates(tmp_path))
    assert found is None
    assert any(
        r.startswith(f"{wrong} is timm's or Meta's DINO v2 ViT-S/14 at 518 pixels, expected DINO v1") for r in reasons
    )
    assert any(r.startswith(f"{broken} is a git-LFS pointer") for r in reasons)
    right = sparse_file(tmp_path / "zz" / "model.safetensors", of_timm(DINO))
    assert choose("dino", candidates(tmp_path))[0] == right


def test_of_several_that_fit_the_best_called_comes_first(tmp_path):
    anything = sparse_file(tmp_path / "a.safetensors", of_timm(DINO))
    assert choose("dino", candidates(tmp_path)) == (anything, [])
    usual = sparse_file(tmp_path / "b" / f"{DINO}.safetensors", of_timm(DINO))
    assert choose("dino", candidates(tmp_path))[0] == usual
    own = sparse_file(tmp_path / "dino.safetensors", of_timm(DINO))
    assert choose("dino", candidates(tmp_path))[0] == own


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = sparse_file(tmp_path / "dino.safetensors", of_timm(SMALL))
    assert choose("dino", candidates(tmp_path))[0] is None
    sparse_file(path, of_timm(DINO))
    assert choose("dino", candidates(tmp_path))[0] == path


def test_files_of_another_kind_give_no_reasons(tmp_path):
    sparse_file(tmp_path / "clip_vision_g.safetensors", clip_vision(1664, 48, projection=1280))
    sparse_file(tmp_path / "model.safetensors", of_open_clip("ViT-L-14"))
    assert choose("dino", candidates(tmp_path)) == (None, [])


def test_a_configuration_beside_the_weights_tells_openais_training_from_laions(tmp_path):
    path = sparse_file(tmp_path / "b32" / "open_clip_model.safetensors", of_open_clip("ViT-B-32"))
    config = path.with_name("open_clip_config.json")
    for model, found in (({}, None), ({"quick_gelu": True}, path)):
        config.write_text(json.dumps({"model_cfg": model}))
        assert choose("clip-vit-b-32", candidates(tmp_path))[0] == found
    config.write_text("{")
    assert choose("clip-vit-b-32", [(path.parent, "clip-vit-b-32")])[0] is None


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"],
        ["open_clip_model.safetensors"],
        ["dinov2_vits14_pretrain.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ],
)
def test_a_folder_is_known_by_its_weights(tmp_path, names):
    shapes = list(of_timm(SMALL).items())
    for i, name in enumerate(names):
        sparse_file(tmp_path / "dinov2-small" / name, dict(shapes[i :: len(names)]))
    assert choose("dinov2-small", [(tmp_path / "dinov2-small", "dinov2-small")]) == (tmp_path / "dinov2-small", [])
    found, reasons = choose("dinov2", [(tmp_path / "dinov2-small", "dinov2")])
    assert found is None
    assert "DINO v2 ViT-S/14 at 518 pixels, expected DINO v2 ViT-L/14" in reasons[0]


def test_ip_adapters_repository_is_known_as_a_whole(tmp_path):
    encoder = tmp_path / "clip" / "models" / "image_encoder"
    sparse_file(encoder / "model.safetensors", of_transformers("clip"))
    (encoder / "config.json").write_text(json.dumps({"hidden_act": "gelu"}))
    assert choose("clip", [(tmp_path / "clip", "clip")]) == (tmp_path / "clip", [])
    (encoder / "config.json").write_text(json.dumps({"hidden_act": "quick_gelu"}))
    assert "has the activation quick_gelu, expected gelu" in choose("clip", [(tmp_path / "clip", "clip")])[1][0]


def test_a_projector_of_another_adapter_does_not_hide_the_right_one(tmp_path):
    projector = {
        "image_proj.proj.weight": (4 * 768, 1024),
        "image_proj.proj.bias": (4 * 768,),
        "image_proj.norm.weight": (768,),
        "image_proj.norm.bias": (768,),
    }
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    wide = sparse_file(tmp_path / "wide.safetensors", projector | {"image_proj.proj.weight": (4 * 768, 1280)})
    right = sparse_file(tmp_path / "right.safetensors", projector | {"ip_adapter.1.to_k_ip.weight": (320, 768)})
    assert choose_projector("clip", [empty, wide, right]) == right
    assert choose_projector("clip", [empty, wide, tmp_path / "absent.safetensors"]) is None
