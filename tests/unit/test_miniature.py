"""The embedded family as it is shipped: whole, small enough, and as good as its figures say, judged by the renderer."""

import json
import shutil

import numpy as np
import pytest
import torch

from echodistill_core.errors import InputError
from echodistill_core.miniature import judges as judging
from echodistill_core.miniature.recipe.quality import judge_accuracy, matches, vae_psnr
from echodistill_core.miniature.render import render
from echodistill_core.miniature.world import COLORS, CONTEXTS, SHAPES, Scene, Subject, random_scene, random_subject
from echodistill_core.models import embedded
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.perception.load import load_backbones
from echodistill_core.sampling import denoise, draw_noise


@pytest.fixture(scope="module")
def family():
    return open_family(ModelSources(family="miniature")).to("cpu", torch.float32)


@pytest.fixture(scope="module")
def judges():
    return judging.load_judges()


def pictures(scenes):
    stacked = np.stack([render(scene) for scene in scenes]).transpose(0, 3, 1, 2)
    return torch.from_numpy(stacked).float() / 127.5 - 1


def test_the_weights_are_half_precision_and_25_megabytes_at_most():
    from safetensors import safe_open

    files = [p for p in embedded.FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                kinds = {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}, path
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_the_manifest_lists_every_file():
    listed = set(embedded.manifest()["files"])
    there = {p.relative_to(embedded.FOLDER).as_posix() for p in embedded.FOLDER.rglob("*") if p.is_file()}
    assert listed == there - {embedded.MANIFEST}


@pytest.mark.parametrize(
    ("damage", "words"), [("missing", "is missing"), ("changed", "is damaged"), ("list", "lists no")]
)
def test_damaged_weights_are_named_with_the_remedy(tmp_path, monkeypatch, damage, words):
    copy = tmp_path / "weights"
    shutil.copytree(embedded.FOLDER, copy)
    victim = copy / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        victim.unlink()
    elif damage == "changed":
        data = bytearray(victim.read_bytes())
        data[-100] ^= 1
        victim.write_bytes(data)
    else:
        (copy / embedded.MANIFEST).write_text("{}")
    monkeypatch.setattr(embedded, "FOLDER", copy)
    embedded._check.cache_clear()
    with pytest.raises(InputError, match=words) as error:
        embedded.embedded_folder("student")
    assert "git checkout" in str(error.value)
    assert str(victim if damage != "list" else copy / embedded.MANIFEST) in str(error.value)


def test_the_vae_keeps_26_decibels(family):
    assert vae_psnr(family) >= 26
    assert vae_psnr(family) == pytest.approx(embedded.manifest()["quality"]["vae_psnr"], abs=0.1)


def test_latents_have_unit_variance(family):
    rng = np.random.default_rng(5)
    scenes = [random_scene(random_subject(rng), str(rng.choice(list(CONTEXTS))), rng) for _ in range(128)]
    with torch.no_grad():
        z = family.encode(pictures(scenes))
    assert z.shape == (128, 8, 8, 8)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(8), atol=0.15)
    assert z.mean((0, 2, 3)).abs().max() < 0.2


def test_the_classifier_reads_what_the_renderer_drew(judges):
    for name, share in judge_accuracy(judges).items():
        assert share > 0.93, name


def test_the_judge_of_identity_knows_a_subject_in_another_context(judges):
    rng = np.random.default_rng(6)
    subjects = [random_subject(rng, all_colors=True) for _ in range(100)]
    views = [
        pictures([random_scene(s, str(c), rng) for s, c in zip(subjects, rng.choice(list(CONTEXTS), 100), strict=True)])
        for _ in range(2)
    ]
    a, b = (torch.nn.functional.normalize(judges.identity(x), dim=1) for x in views)
    found = (a @ b.T).argmax(1) == torch.arange(100)
    assert found.float().mean() > 0.8


def test_the_judge_of_text_finds_the_caption_of_a_picture(judges):
    rng = np.random.default_rng(7)
    scenes, captions = [], []
    for shape in SHAPES:
        for context, words in CONTEXTS.items():
            color = str(rng.choice(list(COLORS)))
            scenes.append(random_scene(Subject(shape, color, second=color), context, rng))
            captions.append(f"photo of a {color} {shape} {words}")
    a = torch.nn.functional.normalize(judges.image_text_image(pictures(scenes)), dim=1)
    b = torch.nn.functional.normalize(judges.image_text_text(captions), dim=1)
    assert ((a @ b.T).argmax(1) == torch.arange(64)).float().mean() > 0.8  # by chance 1/64


def test_the_one_step_student_draws_what_prompts_say(family, judges):
    """A sixth of the recipe's own check, with other noise: every shape and context once."""
    scenes, prompts = [], []
    for i, shape in enumerate(SHAPES):
        for k, (context, words) in enumerate(CONTEXTS.items()):
            color = list(COLORS)[(i + k) % 8]
            scenes.append(Scene(Subject(shape, color, second=color), context, 0, 0, 0.6, 0, 1, False, 0))
            prompts.append(f"photo of a {color} {shape} {words}")
    noise = draw_noise(family, 64, 64, 64, seed=123)
    with torch.no_grad():
        images = family.decode(denoise(family.student, noise, family.condition(prompts), 1)).clamp(-1, 1)
    seen = judges.attributes(images)
    right = torch.stack([matches(seen, scenes, name) for name in ("shape", "color", "context")]).all(0)
    expected = embedded.manifest()["quality"]["student"]
    # Four standard deviations of a share over 64 samples.
    assert float(right.float().mean()) > expected - 4 * (expected * (1 - expected) / 64) ** 0.5


def test_the_backbones_open_by_the_family_and_share_nothing_with_the_judges(judges):
    backbones = load_backbones({"dino": "dino", "dinov2": "dinov2-small", "clip": "clip"}, "miniature")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    for role, backbone in backbones.items():
        features = backbone.float()(x)
        assert features.shape == (2, backbone.width), role
        assert not torch.allclose(features[0], features[1])
    digests = json.loads((embedded.FOLDER / embedded.MANIFEST).read_text())["files"]
    weights = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    assert len(set(weights.values())) == len(weights)
