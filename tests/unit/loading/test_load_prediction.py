"""The prediction type, the noise schedule, and which checkpoint gives which part."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from published_models import (
    SMALL_SD1,
    assert_holds,
    networks,
    parts_of,
    save_folder,
)

from echodistill_core.errors import InputError
from echodistill_core.models import layout
from echodistill_core.models.architectures import SD1, SD2, TINY
from echodistill_core.models.checkpoint import read_checkpoint
from echodistill_core.models.load import load_family

# What the UNet predicts, and the schedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_folders_scheduler_says_what_is_predicted(tmp_path, folder, models, prediction):
    save_folder(tmp_path, models, prediction)
    assert load_family(tmp_path).student.schedule.prediction_type == prediction


def sd2_unet_with_bias(values, architecture=SD2):
    """A UNet with all the names and shapes of SD 2.x and no memory, but for the tensor that tells v from epsilon."""
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**architecture.unet).state_dict()
    unet = {n: torch.zeros(1).expand(t.shape) for n, t in shapes.items()}
    unet["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"] = values
    return unet


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [(0.02, "epsilon"), (0.0899, "epsilon"), (0.08995, "epsilon"), (0.0901, "v_prediction"), (0.15, "v_prediction")],
)
def test_a_single_file_of_sd2_tells_its_prediction_by_one_bias(deviation, expected):
    # Half the values at +a and half at -a have the population deviation a; 0.08995 has a sample deviation over 0.09.
    values = torch.cat([torch.full((160,), deviation), torch.full((160,), -deviation)]) + 0.3
    unet = sd2_unet_with_bias(values)
    there = layout.unet_names(unet, SD2)
    bias = there["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"]
    assert bias == "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # ComfyUI reads this tensor
    for source in ({"unet": unet}, {"model.diffusion_model." + there[n]: t for n, t in unet.items()}):
        assert read_checkpoint(source).schedule.prediction_type == expected
    assert read_checkpoint({"unet": unet}, prediction="sample").schedule.prediction_type == "sample"


def test_sd1_predicts_noise_whatever_its_bias():
    unet = sd2_unet_with_bias(torch.linspace(-1, 1, 320), SD1)
    assert read_checkpoint({"unet": unet}).architecture is SD1
    assert read_checkpoint({"unet": unet}).schedule.prediction_type == "epsilon"


def test_prediction_can_be_overridden_for_teacher_and_student(parts, folder):
    for source in (parts, folder):
        family = load_family(source, source, student_prediction="sample", teacher_prediction="v_prediction")
        assert family.student.schedule.prediction_type == "sample"
        assert family.teacher.schedule.prediction_type == "v_prediction"


def test_an_unknown_prediction_is_refused(parts):
    with pytest.raises(InputError, match=r"'flow'.*expected one of epsilon"):
        load_family(parts, student_prediction="flow")


def test_the_schedule_is_the_closed_form(folder, file, parts):
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    product, expected = 1.0, []
    for beta in betas:
        product *= 1 - beta
        expected.append(product)
    assert expected[999] == pytest.approx(0.0046601, abs=5e-8)
    for source in (folder, file, parts):
        schedule = load_family(source).student.schedule
        assert schedule.timesteps == 1000
        assert schedule.alphas_cumprod.dtype == torch.float32
        assert torch.allclose(schedule.alphas_cumprod.double(), torch.tensor(expected).double(), rtol=2e-5, atol=0)


# Teacher and student


def test_teacher_and_student_keep_their_own_unets_and_share_the_rest(parts):
    other = parts_of(networks(TINY, 9))
    family = load_family(parts, {**other, "text_encoder": parts["text_encoder"]}, licences={"teacher": "its own"})
    assert_holds(family, parts)  # the student's UNet and VAE
    assert all(torch.equal(t, other["unet"][n]) for n, t in family.teacher.unet.state_dict().items())
    assert (family.teacher.licence, family.student.licence) == ("its own", "unknown")
    assert len(family.networks()) == 4


def test_equal_text_encoders_are_silent_and_different_ones_warn(parts):
    assert load_family(parts, parts).warnings == []
    rounded = {**parts, "text_encoder": {n: t.half() for n, t in parts["text_encoder"].items()}}
    assert load_family(parts, rounded).warnings == []
    other = copy.deepcopy(parts)
    other["text_encoder"]["encoder.layers.1.mlp.fc1.bias"][3] += 0.01
    family = load_family(parts, other)
    (warning,) = family.warnings
    assert "teacher (teacher) and student (student) differ" in warning
    assert_holds(family, {**parts, "text_encoder": other["text_encoder"]})  # the teacher's is the one that is read


def test_without_a_teacher_its_text_encoder_is_still_read(parts):
    other = parts_of(networks(TINY, 9))
    family = load_family(parts, other, with_teacher=False)
    assert family.teacher is None
    assert_holds(family, {**parts, "text_encoder": other["text_encoder"]})
    assert len(family.warnings) == 1


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_part_that_one_lacks_is_taken_from_the_other(parts, part):
    lacking = {n: t for n, t in parts.items() if n != part}
    other = {**parts_of(networks(TINY, 9)), "text_encoder": parts["text_encoder"]}
    expected = {**parts, part: other[part]}
    assert_holds(load_family(lacking, other), expected)
    assert_holds(load_family(parts, {n: t for n, t in other.items() if n != part}), parts)


def test_teacher_and_student_of_different_widths_are_refused(tmp_path, folder, parts):
    narrow = save_folder(tmp_path / "narrow", networks(SMALL_SD1, 2))
    with pytest.raises(InputError, match=r"folder\S* .*32, \S*narrow .*24"):
        load_family(narrow, folder)
    with pytest.raises(InputError, match=r"text encoder .*32.* \S*narrow .*24"):
        load_family(narrow, folder, with_teacher=False)


def test_a_folder_without_a_tokenizer_pads_as_its_width_says(tmp_path, folder):
    """SD 1.x, 768 wide, pads with the end token; SD 2.x with token 0."""
    assert not (save_folder(tmp_path / "plain", networks(TINY, 1)) / "tokenizer").exists()
    assert load_family(tmp_path / "plain").text.tokenize([""])[0, -1] == 0
    config = json.loads((tmp_path / "plain" / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 768
    (tmp_path / "plain" / "unet" / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path / "plain").architecture.pad_with_end
    assert not read_checkpoint(folder).architecture.pad_with_end
