"""Scores of any pictures against the bench's own scoring, and against transformers' models and processors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_backbones import SIDE, VIT
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from echodistill_core.concept.photographs import Photograph
from echodistill_core.evaluation import scoring
from echodistill_core.evaluation.metrics import PROTOCOLS, Protocol
from echodistill_core.evaluation.pictures import score_pictures
from echodistill_core.miniature.concepts import CONCEPTS, photographs
from echodistill_core.miniature.judges import load_judges
from echodistill_core.models.text import clip_tokenizer
from echodistill_core.perception import load
from echodistill_core.perception.backbones import SPECS, TINY_SPECS, BackboneSpec
from echodistill_core.perception.load import BackboneFiles
from echodistill_core.reporting import to_pictures

SMALL_CLIP = CLIPConfig(
    vision_config={**VIT, "intermediate_size": 64},
    text_config={
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    projection_dim=24,
)


def test_the_miniatures_scores_are_the_benchs():
    concept = CONCEPTS["dotted-mug"]
    made = scoring.reference_samples(concept, 2, 1)
    expected = scoring.score(made, concept, "", load_judges())
    prompt = made.prompts[0]
    found = score_pictures(made.images, photographs(concept), prompt, "", PROTOCOLS["miniature"], {})
    assert found == pytest.approx({name: expected[name] for name in ("clip_t", "clip_i", "dino")}, abs=1e-5)


def test_the_placeholder_is_no_part_of_what_clip_reads():
    concept = CONCEPTS["dotted-mug"]
    images = scoring.reference_samples(concept, 2, 1).images
    protocol = PROTOCOLS["miniature"]
    found = [
        score_pictures(images, photographs(concept), prompt, "<new1>", protocol, {})["clip_t"]
        for prompt in ("photo of a <new1> mug on the beach", "photo of a mug on the beach")
    ]
    assert found[0] == found[1]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A protocol of small random encoders, their folders, and the models themselves."""
    true = SPECS["clip-vit-b-32"]
    spec = BackboneSpec(true.name, true.title, SIDE, true.mean, true.std, CLIPModel, SMALL_CLIP, true.features)
    monkeypatch.setattr(load, "SPECS", {**TINY_SPECS, true.name: spec})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        clip, dino = CLIPModel(SMALL_CLIP).eval(), Dinov2Model(Dinov2Config(**VIT)).eval()
    clip.save_pretrained(tmp_path / "clip")
    dino.save_pretrained(tmp_path / "dino")
    protocol = Protocol("small", "small", true.name, "dinov2", SIDE, SIDE, squash=SIDE)
    return (
        protocol,
        {true.name: BackboneFiles(tmp_path / "clip"), "dinov2": BackboneFiles(tmp_path / "dino")},
        clip,
        dino,
    )


def random_pictures(count, seed):
    values = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return values / 127.5 - 1


@torch.no_grad()
def test_scores_of_other_protocols_equal_transformers_own(small):
    protocol, backbone_files, clip, dino = small
    made, real = random_pictures(3, 1), random_pictures(2, 2)
    references = [Photograph(str(i), picture) for i, picture in enumerate(to_pictures(real))]
    found = score_pictures(made, references, "a <new1> dog on the beach", "<new1>", protocol, backbone_files)

    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    seen = [processor(to_pictures(x), return_tensors="pt").pixel_values for x in (made, real)]
    image, reference = (F.normalize(as_tensor(clip.get_image_features(x)), dim=1) for x in seen)
    ids = clip_tokenizer(pad_with_end=True)(["a dog on the beach"], padding="max_length", return_tensors="pt").input_ids
    text = F.normalize(as_tensor(clip.get_text_features(ids)), dim=1)
    assert found["clip_t"] == pytest.approx(float((image @ text.T).mean()), abs=1e-5)
    assert found["clip_i"] == pytest.approx(float((image @ reference.T).mean()), abs=1e-5)

    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in (TINY_SPECS["dinov2"].mean, TINY_SPECS["dinov2"].std))
    a, b = (F.normalize(dino(((x + 1) / 2 - mean) / deviation).last_hidden_state[:, 0], dim=1) for x in (made, real))
    assert found["dino"] == pytest.approx(float((a @ b.T).mean()), abs=1e-4)


def test_without_an_encoder_its_scores_are_left_out(small):
    protocol, backbone_files, _, _ = small
    references = [Photograph("a", to_pictures(random_pictures(1, 2))[0])]
    only = {"dinov2": backbone_files["dinov2"]}
    assert list(score_pictures(random_pictures(1, 1), references, "a dog", "", protocol, only)) == ["dino"]


def as_tensor(features):
    """transformers 5 gives some features as an output object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output
