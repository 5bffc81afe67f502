"""Frozen backbones against transformers' own models and image processors, and IP-Adapter's projector by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from small_backbones import (
    IMAGENET,
    SIDE,
    SMALL_CLIP,
    VIT,
    expected_features,
    model_of,
    pictures,
    processed,
    projector_tensors,
    save,
)
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from echodistill_core.errors import InputError
from echodistill_core.perception import backbones, load
from echodistill_core.perception.backbones import SPECS, TINY_SPECS, BackboneSpec, prepare
from echodistill_core.perception.load import BackboneFiles, load_backbone, load_backbones, tiny_backbone


@pytest.fixture(autouse=True)
def small_specs(monkeypatch):
    """The specifications that loading looks up, in small; SPECS here stays the true one."""
    metrics = {
        name: BackboneSpec(name, true.title, SIDE, true.mean, true.std, CLIPModel, SMALL_CLIP, true.features)
        for name, true in SPECS.items()
        if name.startswith("clip-vit")
    }
    monkeypatch.setattr(load, "SPECS", {**TINY_SPECS, **metrics})


ALL = pytest.mark.parametrize("name", list(SPECS))


# Features


@ALL
def test_features_of_a_folder_equal_transformers_own(tmp_path, name):
    images, x = pictures()
    backbone = load_backbone(name, save(tmp_path, name))
    features = backbone(x)
    expected = expected_features(name, processed(name, images))
    assert features.shape == expected.shape == (2, backbone.width)
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=2e-5)


@ALL
def test_without_normalisation_the_model_sees_the_images_as_they_are(tmp_path, name):
    _, x = pictures()
    backbone = load_backbone(name, save(tmp_path, name))
    assert torch.allclose(backbone(x, normalise=False), expected_features(name, x), atol=2e-5)
    assert not torch.allclose(backbone(x), backbone(x, normalise=False), atol=1e-2)


@ALL
@pytest.mark.parametrize("names", ["as saved", "of this transformers"])
def test_a_single_file_gives_the_folders_features(tmp_path, name, names):
    _, x = pictures()
    folder = save(tmp_path / "folder", name)
    expected = load_backbone(name, folder)(x)
    file = tmp_path / f"{name}.safetensors"
    weights = next(folder.rglob("model.safetensors"))
    save_file(load_file(weights) if names == "as saved" else model_of(name).state_dict(), file)
    projector = next(folder.rglob("ip-adapter_sd15.safetensors"), None)
    assert torch.equal(load_backbone(name, file, projector)(x), expected)


@pytest.mark.parametrize(("name", "prefix"), [("dino", "vit."), ("dinov2", "dinov2.")])
def test_a_file_with_the_models_prefix_and_a_classifier_loads(tmp_path, name, prefix):
    tensors = load_file(save(tmp_path / "folder", name) / "model.safetensors")
    tensors = {prefix + n: t for n, t in tensors.items()} | {"classifier.weight": torch.zeros(5, 32)}
    save_file(tensors, tmp_path / "prefixed.safetensors")
    _, x = pictures()
    expected = load_backbone(name, tmp_path / "folder")(x)
    assert torch.equal(load_backbone(name, tmp_path / "prefixed.safetensors")(x), expected)


@ALL
def test_half_precision_files_stay_half_and_give_float32_features(tmp_path, name):
    folder = save(tmp_path, name)
    expected = load_backbone(name, folder)(pictures()[1])
    for path in folder.rglob("*.safetensors"):
        save_file({n: t.half() for n, t in load_file(path).items()}, path)
    backbone = load_backbone(name, folder)
    assert {p.dtype for p in backbone.parameters()} == {torch.float16}
    features = backbone(pictures()[1])
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=0.05)


def test_a_half_precision_projector_serves_a_single_precision_encoder(tmp_path):
    """As IP-Adapter publishes them."""
    expected = load_backbone("clip", save(tmp_path, "clip"))(pictures()[1])
    save_file({n: t.half() for n, t in projector_tensors().items()}, next(tmp_path.rglob("ip-adapter*")))
    backbone = load_backbone("clip", tmp_path)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert torch.allclose(backbone(pictures()[1]), expected, atol=0.02)


def test_loading_keeps_single_precision_where_the_configuration_says_half(tmp_path):
    folder = save(tmp_path, "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    weights = {n: t for n, t in model_of("dino").state_dict().items() if not n.startswith("pooler.")}
    loaded = load_backbone("dino", folder).encoder.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(t, weights[n]) for n, t in loaded.items())


def test_features_let_gradients_through_to_the_image_and_keep_the_weights_frozen(tmp_path):
    for name in SPECS:
        backbone = load_backbone(name, save(tmp_path / name, name))
        assert not backbone.training
        x = pictures(side=40)[1].requires_grad_()
        (backbone(x) * torch.linspace(-1, 1, backbone.width)).sum().backward()
        assert x.grad.abs().amax((1, 2, 3)).min() > 0
        assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def test_tokens_of_the_projector_and_of_the_others():
    features = torch.arange(2 * 64.0).reshape(2, 64)
    tokens = tiny_backbone("clip").tokens(features)
    assert tokens.shape == (2, 4, 16)
    assert torch.equal(tokens[1, 2], features[1, 32:48])
    assert torch.equal(tiny_backbone("dino").tokens(features[:, :32]), features[:, None, :32])


# Preparation


def test_sizes_and_normalisation_are_the_published_ones():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    openai = CLIPImageProcessor()
    clip = (tuple(openai.image_mean), tuple(openai.image_std))
    expected = {
        "dino": (224, *imagenet),
        "dinov2": (518, *imagenet),
        "dinov2-small": (224, *imagenet),
        "clip": (224, *clip),
        "clip-vit-l-14-336": (336, *clip),
        "clip-vit-b-32": (224, *clip),
    }
    assert {n: (s.size, s.mean, s.std) for n, s in SPECS.items()} == expected
    for name, spec in TINY_SPECS.items():
        assert (spec.mean, spec.std) == (SPECS[name].mean, SPECS[name].std)


@pytest.mark.parametrize("size", [(48, 48), (64, 40), (20, 20)])
def test_images_are_resized_as_pillow_does_before_they_are_normalised(size):
    images, _ = pictures(side=64)
    image = images[0].resize(size, Image.Resampling.BOX)
    x = torch.tensor(list(image.tobytes())).reshape(1, size[1], size[0], 3).movedim(-1, 1) / 127.5 - 1
    spec = TINY_SPECS["dino"]
    expected = ViTImageProcessor(do_resize=False, **IMAGENET)(
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), return_tensors="pt"
    ).pixel_values
    # Pillow rounds to whole grey levels, after each of two passes, and clips; a level is 0.0175 after normalisation.
    difference = prepare(x.clamp(-1, 1), spec, normalise=True) - expected
    assert difference.abs().max() < 0.04


def test_an_image_of_the_right_size_is_not_resampled():
    _, x = pictures()
    assert prepare(x, TINY_SPECS["dino"], normalise=False) is x
    black = prepare(-torch.ones(1, 3, SIDE, SIDE), TINY_SPECS["dino"], normalise=True)
    assert torch.allclose(black[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


# The true architectures


@pytest.mark.parametrize(
    ("name", "millions", "width"),
    [
        ("dino", 21.67, 384),
        ("dinov2", 304.37, 1024),
        ("dinov2-small", 22.06, 384),
        ("clip", 632.08, 4 * 768),
        ("clip-vit-l-14-336", 427.94, 768),
        ("clip-vit-b-32", 151.28, 512),
    ],
)
def test_true_specifications_have_the_published_numbers_of_weights(name, millions, width):
    spec = SPECS[name]
    with torch.device("meta"):
        encoder = spec.build(spec.config).eval()
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
        features = spec.features(encoder, torch.empty(1, 3, spec.size, spec.size))
    assert features.shape == (1, 1024 if name == "clip" else width)
    assert backbones.Backbone(spec, encoder).width == width
    if spec.projector is not None:
        assert spec.projector == {"image_embed_dim": 1024, "cross_attention_dim": 768, "num_image_text_embeds": 4}


# Tiny ones


def test_tiny_backbones_are_always_the_same_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    for name in TINY_SPECS:
        a, b = tiny_backbone(name), tiny_backbone(name)
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
        _, x = pictures()
        assert a(x).shape == (2, a.width)
        assert a(x).std() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_ones_are_had_for_every_role():
    loaded = load_backbones({"identity": "clip", "critic of dino": "dino"}, "tiny")
    assert {role: b.spec.name for role, b in loaded.items()} == {"identity": "clip", "critic of dino": "dino"}


# Where they come from


def test_several_are_loaded_from_subfolders_and_files(tmp_path, empty_cache):
    source = tmp_path / "backbones"
    for name in ("dino", "clip"):
        save(source / name, name)
    save_file(model_of("dinov2").state_dict(), source / "dinov2.safetensors")
    loaded = load_backbones({"dino": "dino", "dinov2": "dinov2", "clip": "clip"}, str(source))
    images, x = pictures()
    for name, backbone in loaded.items():
        assert torch.allclose(backbone(x), expected_features(name, processed(name, images)), atol=2e-5)


def test_places_that_a_caller_found_are_used_as_they_are(tmp_path, empty_cache):
    """As ComfyUI keeps them: the encoder in one folder, IP-Adapter's projector in another."""
    clip = save(tmp_path / "ip", "clip")
    encoder = tmp_path / "clip_vision" / "CLIP-ViT-H-14.safetensors"
    encoder.parent.mkdir()
    (clip / "models" / "image_encoder" / "model.safetensors").rename(encoder)
    backbone_files = {
        "clip": BackboneFiles(encoder, clip / "models" / "ip-adapter_sd15.safetensors"),
        "dino": BackboneFiles(save(tmp_path / "dino", "dino")),
    }
    images, x = pictures()
    for name, backbone in load_backbones({"clip": "clip", "dino": "dino"}, backbone_files).items():
        assert torch.allclose(backbone(x), expected_features(name, processed(name, images)), atol=2e-5)
    with pytest.raises(InputError, match=r"\(dinov2\)"):
        load_backbones({"dino": "dino", "dinov2": "dinov2"}, backbone_files)


def test_all_that_is_missing_is_named_at_once_with_the_command(tmp_path, empty_cache):
    (tmp_path / "some").mkdir()
    save(tmp_path / "some" / "dino", "dino")
    wanted = {"dino": "dino", "dinov2": "dinov2", "clip": "clip"}
    with pytest.raises(InputError) as caught:
        load_backbones(wanted, str(tmp_path / "some"))
    message = str(caught.value)
    assert "(dinov2)" in message
    assert "(clip)" in message
    assert "(dino)" not in message
    assert str(tmp_path / "some") in message
    assert message.endswith("Run: echodistill download dinov2 clip")
    with pytest.raises(InputError, match=r"echodistill download dino dinov2 clip$"):
        load_backbones(wanted)


def test_a_missing_folder_is_named(tmp_path, empty_cache):
    with pytest.raises(InputError, match=r"backbones .*nowhere"):
        load_backbones({"dino": "dino"}, str(tmp_path / "nowhere"))


# Bad input


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["dino", "dinov2", "clip", "clip-vit-b-32"])
def test_missing_and_misshapen_tensors_are_refused(tmp_path, name, as_folder):
    folder = save(tmp_path / "folder", name)
    weights = next(folder.rglob("model.safetensors"))
    whole = load_file(weights)
    first = next(n for n in sorted(whole) if "embeddings.patch" in n and n.endswith("weight"))
    for broken in ({n: t for n, t in whole.items() if n != first}, {**whole, first: torch.zeros(3, 3)}):
        place = folder if as_folder else tmp_path / "one.safetensors"
        save_file(broken, weights if as_folder else place)
        with pytest.raises(InputError, match=r"\S*embeddings\.patch"):
            load_backbone(name, place, next(folder.rglob("ip-adapter*"), None))


def test_a_folder_of_another_size_is_refused(tmp_path):
    ViTModel(ViTConfig(**{**VIT, "hidden_size": 64}, intermediate_size=64)).save_pretrained(tmp_path / "wide")
    Dinov2Model(Dinov2Config(**{**VIT, "num_hidden_layers": 1})).save_pretrained(tmp_path / "shallow")
    for name, place, found in (
        ("dino", "wide", "ViT-64/8 at 32 pixels, expected tiny random ViT .*width 64 instead of 32"),
        ("dinov2", "shallow", "DINO v2 ViT-32/8 at 32 pixels, expected tiny random DINO v2 .*depth 1 instead of 2"),
    ):
        with pytest.raises(InputError, match=rf"{place} is transformers' {found}"):
            load_backbone(name, tmp_path / place)


def test_pickles_and_truncated_or_absent_weights_are_refused(tmp_path):
    weights = save(tmp_path, "dino") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_backbone("dino", tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickle \(pytorch_model\.bin\)"):
        load_backbone("dino", tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"\.safetensors"):
        load_backbone("dino", tmp_path)


def test_a_broken_configuration_is_refused(tmp_path):
    (save(tmp_path, "dino") / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        load_backbone("dino", tmp_path)


def test_clip_without_its_projector_or_with_another_is_refused(tmp_path):
    path = save(tmp_path, "clip") / "models" / "ip-adapter_sd15.safetensors"
    save_file(projector_tensors(width=8), path)
    with pytest.raises(InputError, match=r"ip-adapter_sd15\.safetensors"):
        load_backbone("clip", tmp_path)
    save_file({n: t for n, t in projector_tensors().items() if n != "image_proj.norm.bias"}, path)
    with pytest.raises(InputError, match=r"norm\.bias"):
        load_backbone("clip", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"ip-adapter_sd15\.safetensors"):
        load_backbone("clip", tmp_path)


def test_the_projector_equals_linear_reshape_and_layer_norm():
    """The same by torch's own functions at the true width, so that the order of tokens and width is seen."""
    t = projector_tensors(embedding=1024, width=768)
    projector = load._projector(SPECS["clip"], t, "ip-adapter")
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    linear = F.linear(x, t["image_proj.proj.weight"], t["image_proj.proj.bias"]).reshape(3, 4, 768)
    expected = F.layer_norm(linear, (768,), t["image_proj.norm.weight"], t["image_proj.norm.bias"])
    assert torch.allclose(projector(x), expected, atol=1e-5)
