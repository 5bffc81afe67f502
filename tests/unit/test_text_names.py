"""The text encoder of a single file under every name that trainers and converters give it."""

import pytest
import torch
from checkpoints import TEXT, refused, single_file
from tensor_files import assert_same

from echodistill_core.models.load import load_family

PLACES = [
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.text_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.0.transformer.",
    "text_encoder.text_model.",
    "text_encoder.",
    "text_encoders.clip_h.transformer.text_model.",
    "text_encoders.clip_l.transformer.text_model.",
    "text_model.",
]
OPEN_CLIP_PLACES = ["cond_stage_model.model.", "conditioner.embedders.0.model.", "cond_stage_model.", "text_encoder."]


def without_text(parts):
    return {n: t for n, t in single_file(parts).items() if not n.startswith(TEXT)}


@pytest.mark.parametrize("place", PLACES)
def test_transformers_names(parts, place):
    text = {place + n: t for n, t in parts["text_encoder"].items()}
    text[f"{place}embeddings.position_ids"] = torch.arange(77)[None]
    # A 3rd layer, which a UNet of this family does not read.
    text |= {n.replace(".layers.1.", ".layers.2."): t + 1 for n, t in text.items() if ".layers.1." in n}
    family = load_family({**without_text(parts), **text})
    assert_same(family.text.model.state_dict(), parts["text_encoder"])
    assert family.warnings == []


@pytest.mark.parametrize("place", OPEN_CLIP_PLACES)
def test_open_clips_names(parts, place):
    text = {place + n.removeprefix(TEXT): t for n, t in single_file(parts).items() if n.startswith(TEXT)}
    family = load_family({**without_text(parts), **text})
    assert_same(family.text.model.state_dict(), parts["text_encoder"])
    assert family.warnings == []


def test_a_text_encoder_of_too_few_layers_is_refused_by_the_first_that_is_missing(parts):
    text = {n: t for n, t in parts["text_encoder"].items() if ".layers.1." not in n}
    assert "(the first is encoder.layers.1." in refused({**parts, "text_encoder": text})


def test_joined_weights_that_are_no_three_parts_are_refused(parts):
    name = f"{TEXT}transformer.resblocks.0.attn.in_proj_bias"
    for wrong in (torch.zeros(95), torch.zeros(())):
        message = refused({**single_file(parts), name: wrong})
        assert name in message
        assert "three equal parts" in message
