"""Networks that look like a backbone and are another: refused with their names, told from shapes of the true size."""

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from echodistill_core.errors import InputError
from echodistill_core.perception import load
from echodistill_core.perception.load import load_backbone

DINO, SMALL = "vit_small_patch16_224.dino", "vit_small_patch14_dinov2.lvd142m"


def open_clip_of(size, **options):
    """Tensors of an OpenCLIP network by its own name, shapes only."""
    with torch.device("meta"):
        return open_clip.create_model(size, pretrained=None, device="meta", **options).state_dict()


def timm_of(size, **options):
    with torch.device("meta"):
        return timm.create_model(size, pretrained=False, **options).state_dict()


REFUSED = {
    "CLIP of another size": (
        "clip",
        lambda: open_clip_of("ViT-L-14"),
        r"OpenCLIP's CLIP ViT-L/14 at 224 pixels, expected CLIP ViT-H/14 .*width 1024 instead of 1280, "
        r"depth 24 instead of 32",
    ),
    "CLIP of another grid": (
        "clip-vit-l-14-336",
        lambda: open_clip_of("ViT-L-14"),
        r"ViT-L/14 at 224 pixels, expected OpenAI CLIP ViT-L/14@336 .*position embeddings 257 instead of 577",
    ),
    "CLIP without its text encoder": (
        "clip-vit-b-32",
        lambda: {n: t for n, t in open_clip_of("ViT-B-32").items() if n.startswith("visual.")},
        r"CLIP ViT-B/32 at 224 pixels, expected OpenAI CLIP ViT-B/32 .*: no text encoder beside it",
    ),
    "DINO v2 with registers": (
        "dinov2-small",
        lambda: timm_of("vit_small_patch14_reg4_dinov2"),
        r"timm's or Meta's DINO v2 ViT-S/14 with registers.*expected DINO v2 ViT-S/14",
    ),
    "Meta's DINO v2 with registers": (
        "dinov2-small",
        lambda: {**timm_of(SMALL), "register_tokens": torch.empty(1, 4, 384)},
        r"DINO v2 ViT-S/14 with registers at 518 pixels",
    ),
    "DINO v2 giant": (
        "dinov2",
        lambda: timm_of("vit_giant_patch14_dinov2", depth=3),
        r"DINO v2 ViT-g/14 at 518 pixels, expected DINO v2 ViT-L/14 .*width 1536 instead of 1024",
    ),
    "DINO v2 of another grid": (
        "dinov2-small",
        lambda: timm_of(SMALL, img_size=224),
        r"ViT-S/14 at 224 pixels, expected .*number of position embeddings 257 instead of 1370",
    ),
    "a supervised ViT": (
        "dino",
        lambda: timm_of("vit_small_patch16_224.augreg_in1k"),
        r"ViT-S/16 with a classifier at 224 pixels, expected DINO v1 ViT-S/16",
    ),
    "DINO v2 for DINO": (
        "dino",
        lambda: timm_of(SMALL),
        r"timm's or Meta's DINO v2 ViT-S/14 at 518 pixels, expected DINO v1 ViT-S/16",
    ),
    "two networks": (
        "dino",
        lambda: {f"{p}.{n}": t for p in ("student", "ema") for n, t in timm_of(DINO).items()},
        r"file of several networks \(student\., ema\.\)",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_another_network_is_refused_with_its_name(tmp_path, monkeypatch, case):
    """Without a file: only shapes are asked about, before anything is converted."""
    name, tensors, message = REFUSED[case]
    monkeypatch.setattr(load, "tensors_in", lambda place: tensors())
    with pytest.raises(InputError, match=rf"^\S*given\.safetensors is .*{message}.*download {name}$"):
        load_backbone(name, tmp_path / "given.safetensors", tmp_path / "no projector")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t * float("nan"), "NaN or infinity"),
        (lambda t: (t * 100).to(torch.int8), "holds whole numbers"),
    ],
)
def test_weights_that_are_no_numbers_are_named_at_load(tmp_path, spoil, reason):
    """Training reported the learning rates as the cause of the critics' NaN."""
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    tensors["blocks.0.mlp.fc1.weight"] = spoil(tensors["blocks.0.mlp.fc1.weight"])
    save_file(tensors, tmp_path / "dino.safetensors")
    with pytest.raises(InputError, match=rf"dino\.safetensors.*{reason}"):
        load_backbone("dino", tmp_path / "dino.safetensors")
