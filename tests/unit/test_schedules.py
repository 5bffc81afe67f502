"""Noise schedules from scheduler configurations, and those from which no image can come."""

import json

import pytest
import torch
from checkpoints import checkpoint_parts, refused, write_folder
from diffusers import DDIMScheduler

from echodistill_core.models.architectures import STABLE_DIFFUSION_NOISE
from echodistill_core.models.load import load_family
from echodistill_core.models.schedules import schedule_of
from echodistill_core.sampling import denoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint") / "plain", checkpoint_parts())


def configure(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**STABLE_DIFFUSION_NOISE, "prediction_type": "epsilon", **changes}))
    return path


BETAS = torch.linspace(1e-4, 2e-2, 1000).tolist()
REFUSED = {
    "zero terminal SNR with epsilon": ({"rescale_betas_zero_snr": True}, "alphas_cumprod is 0"),
    "unknown prediction": ({"prediction_type": "flow_prediction"}, "'flow_prediction' is unknown"),
    "prediction that is no word": ({"prediction_type": ["epsilon"]}, "is unknown"),
    "unknown betas": ({"beta_schedule": "cosine"}, "beta_schedule 'cosine' is unknown"),
    "fewer timesteps": ({"num_train_timesteps": 500}, "num_train_timesteps is 500; expected 1000"),
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "another noise process"),
    "EDM": ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    "no timesteps": ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
    "fewer betas": ({"trained_betas": BETAS[:10]}, "has 10 timesteps"),
    "NaN among betas": ({"trained_betas": [*BETAS[:-1], float("nan")]}, "runs from 0.9999 to nan"),
    "a negative beta": ({"trained_betas": [*BETAS[:500], -0.5, *BETAS[501:]]}, "expected numbers that fall"),
    "betas of 0": ({"trained_betas": [0.0] * 1000}, "expected numbers that fall"),
    "betas over 1": ({"trained_betas": [1.5] * 1000}, "expected numbers that fall"),
    "betas of words": ({"trained_betas": ["a"] * 1000}, "no noise schedule can be made"),
    "a beta_end of words": ({"beta_end": "a"}, "no noise schedule can be made"),
    "a beta_end beyond 1": ({"beta_end": 12.0}, "expected numbers that fall"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schedule_without_images_is_refused_by_its_file(folder, case):
    changes, expected = REFUSED[case]
    path = configure(folder, **changes)
    message = refused(folder)
    assert str(path) in message
    assert expected in message
    assert len(message) < 600


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "PNDMScheduler"])
def test_the_class_of_a_scheduler_of_betas_plays_no_part(folder, name):
    configure(folder, _class_name=name)
    schedule = load_family(folder).student.schedule
    assert torch.equal(schedule.alphas_cumprod, DDIMScheduler(**STABLE_DIFFUSION_NOISE).alphas_cumprod)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_sound_where_the_last_step_needs_no_division(folder, prediction):
    configure(folder, rescale_betas_zero_snr=True, prediction_type=prediction)
    schedule = load_family(folder).student.schedule
    theirs = DDIMScheduler(**STABLE_DIFFUSION_NOISE, rescale_betas_zero_snr=True, prediction_type=prediction)
    assert schedule.alphas_cumprod[-1] == 0
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    z, v = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).chunk(2)
    t = torch.tensor([999])
    # x0 = sqrt(0) z - sqrt(1) v, and the noise is all of z.
    assert torch.equal(schedule.to_x0(v, z, t), -v if prediction == "v_prediction" else v)
    assert torch.equal(schedule.to_epsilon(v, z, t), z)


def test_a_zero_snr_student_makes_finite_latents_in_one_and_more_steps(folder):
    configure(folder, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    family = load_family(folder)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = family.condition(["a dog"])
    for steps in (1, 4):
        assert denoise(family.student, noise, text, steps).isfinite().all()
    t = torch.tensor([999])
    assert torch.allclose(denoise(family.student, noise, text, 1), -family.student.predict(noise, t, text))


def test_what_the_user_says_counts_before_the_schedule_is_judged(folder):
    configure(folder, rescale_betas_zero_snr=True)
    assert load_family(folder, student_prediction="v_prediction").student.schedule.prediction_type == "v_prediction"
    configure(folder, prediction_type="flow_prediction")
    assert load_family(folder, student_prediction="epsilon").student.schedule.prediction_type == "epsilon"


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedules_of_diffusers_are_read(kind):
    scheduler = {**STABLE_DIFFUSION_NOISE, "beta_schedule": kind}
    assert torch.equal(schedule_of(scheduler, "epsilon").alphas_cumprod, DDIMScheduler(**scheduler).alphas_cumprod)


def test_betas_of_ones_own_are_read():
    abar = schedule_of({**STABLE_DIFFUSION_NOISE, "trained_betas": BETAS}, "epsilon").alphas_cumprod
    expected = (1 - torch.tensor(BETAS, dtype=torch.float64)).cumprod(0)
    assert torch.allclose(abar.double(), expected, rtol=1e-4, atol=0)
