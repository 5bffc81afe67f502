"""Families by name, and the tiny family."""

import pytest
import torch
from published_models import PROMPT, TO_K, assert_holds, networks, noise, parts_of, single_file, write_lora
from safetensors.torch import save_file

from echodistill_core.errors import InputError
from echodistill_core.models.architectures import TINY
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources

# Families by name


@pytest.mark.parametrize(
    ("family", "repo"),
    [
        ("sd-turbo", "sd-turbo"),
        ("sd-turbo-base", "sd-turbo"),
        ("hyper-sd15", "Hyper-SD"),
    ],
)
def test_a_family_not_in_the_hub_cache_names_the_command_that_gets_it(empty_cache, family, repo):
    with pytest.raises(InputError, match=rf"{repo} .* echodistill download {family}-family"):
        open_family(ModelSources(family=family))


def test_the_teacher_that_is_not_cached_is_named_where_the_student_is_given(empty_cache, file):
    with pytest.raises(InputError, match=r"stable-diffusion-2-1 .*echodistill download"):
        open_family(ModelSources(student=str(file)))


def test_wrong_paths_are_named_and_the_nearest_name_suggested(empty_cache, file):
    with pytest.raises(InputError, match=r"'sd-turbo1'.* sd-turbo\?"):
        open_family(ModelSources(student="sd-turbo1"))
    with pytest.raises(InputError, match=r"student_lora .*none\.safetensors"):
        open_family(ModelSources(family="tiny", student_lora="none.safetensors"))


def test_own_files_take_the_place_of_a_familys_parts(empty_cache, tmp_path, file, parts):
    other = tmp_path / "other.safetensors"
    save_file(single_file({**parts_of(networks(TINY, 9)), "text_encoder": parts["text_encoder"]}, TINY), other)
    family = open_family(ModelSources(student=str(file), teacher=str(other), teacher_prediction="v_prediction"))
    assert_holds(family, parts)
    assert family.teacher.fingerprint != family.student.fingerprint
    assert family.teacher.schedule.prediction_type == "v_prediction"
    assert family.student.licence.startswith("that of the checkpoint tiny.safetensors; Stability AI")
    assert family.teacher.licence.startswith("that of the checkpoint other.safetensors; CreativeML")
    assert family.student.origin == str(file)


# The tiny family


def test_the_tiny_family_is_always_the_same_and_leaves_the_generator_alone():
    families = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        families.append(open_family(ModelSources(family="tiny")))
        assert torch.equal(torch.get_rng_state(), before)
    a, b = families
    for x, y in zip(a.networks().values(), b.networks().values(), strict=True):
        assert all(torch.equal(t, y.state_dict()[n]) for n, t in x.state_dict().items())
    assert a.student.fingerprint == b.student.fingerprint != a.teacher.fingerprint


def test_the_tiny_family_is_sd21_and_sd_turbo_in_small():
    family = open_family(ModelSources(family="tiny"))
    assert family.teacher.schedule.prediction_type == "v_prediction"
    assert family.student.schedule.prediction_type == "epsilon"
    assert family.warnings == []
    assert family.latent_factor == 8
    assert open_family(ModelSources(family="tiny"), with_teacher=False).teacher is None
    z, t = noise(1, 2, 4, 8, 8), torch.tensor([999, 3])
    for denoiser in (family.student, family.teacher):
        assert denoiser.predict(z, t, family.condition([PROMPT, ""])).isfinite().all()
    assert family.decode(z).shape == (2, 3, 64, 64)


def test_what_a_user_says_counts_for_the_tiny_family_too(tmp_path, file, parts):
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0})
    plain = open_family(ModelSources(family="tiny"))
    said = open_family(
        ModelSources(family="tiny", teacher_prediction="epsilon", student_prediction="sample", student_lora=str(lora))
    )
    assert said.teacher.schedule.prediction_type == "epsilon"
    assert said.student.schedule.prediction_type == "sample"
    assert said.student.fingerprint != plain.student.fingerprint
    own = open_family(ModelSources(family="tiny", student=str(file)))
    assert all(torch.equal(t, parts["unet"][n]) for n, t in own.student.unet.state_dict().items())
    assert own.teacher.fingerprint == plain.teacher.fingerprint
    assert own.teacher.schedule.prediction_type == "v_prediction"
