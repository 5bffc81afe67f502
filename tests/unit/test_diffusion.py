"""The algebra of noise and clean latents against closed forms in float64 and against diffusers' schedulers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from random_tensors import normal

from echodistill_core.diffusion import PREDICTION_TYPES, NoiseSchedule, guided, timesteps_like, trailing_timesteps
from echodistill_core.errors import InputError
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.models.family import Denoiser
from echodistill_core.sampling import denoise

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
# abar of Stable Diffusion from its definition: betas are the squares of 1000 evenly spaced numbers.
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TIMESTEPS = torch.tensor([0, 1, 250, 499, 998, 999])


def schedule(prediction, table=ABAR):
    return NoiseSchedule(torch.as_tensor(table, dtype=torch.float32), prediction)


def ddim(steps, prediction):
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.fixture(scope="module")
def models(tiny_family):
    """A UNet as a denoiser of any prediction type, with text features and noise of three images."""
    unet = tiny_family().student.unet

    def denoiser(prediction):
        return Denoiser(unet, schedule(prediction), "", "")

    return denoiser, normal(3, 77, 32, seed=1), normal(3, 4, 8, 8, seed=2)


# --- the schedule ---------------------------------------------------------------------------------


def test_tiny_family_has_stable_diffusions_noise_schedule(tiny_family):
    family = tiny_family()
    reference = DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod
    for denoiser in (family.teacher, family.student):
        torch.testing.assert_close(denoiser.schedule.alphas_cumprod, reference, rtol=1e-6, atol=0)
        np.testing.assert_allclose(denoiser.schedule.alphas_cumprod.double().numpy(), ABAR, rtol=2e-5)
        assert denoiser.schedule.timesteps == 1000


def test_last_timestep_has_the_known_signal():
    signal, sigma = schedule("epsilon").signal_and_noise(torch.tensor([999]), torch.zeros(1, 4, 2, 2))
    assert signal.shape == sigma.shape == (1, 1, 1, 1)
    assert signal.item() == pytest.approx(0.068265, abs=1e-6)
    assert (sigma / signal).item() == pytest.approx(14.61465, rel=1e-5)


def test_unknown_prediction_type_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'flow'.*v_prediction"):
        schedule("flow")


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_conversions_agree_with_closed_forms_in_float64(prediction):
    z0, noise = normal(6, 4, 3, 5).double(), normal(6, 4, 3, 5, seed=1).double()
    s = schedule(prediction)
    abar = s.alphas_cumprod.double().numpy()[TIMESTEPS.numpy()].reshape(6, 1, 1, 1)
    z, n = z0.numpy(), noise.numpy()
    zt = np.sqrt(abar) * z + np.sqrt(1 - abar) * n
    target = {"epsilon": n, "v_prediction": np.sqrt(abar) * n - np.sqrt(1 - abar) * z, "sample": z}[prediction]
    np.testing.assert_allclose(s.add_noise(z0, noise, TIMESTEPS).numpy(), zt, rtol=0, atol=1e-13)
    np.testing.assert_allclose(s.target(z0, noise, TIMESTEPS).numpy(), target, rtol=0, atol=1e-13)
    # Any prediction p, not a perfect one, determines noise and clean latents through the two defining equations.
    p = normal(6, 4, 3, 5, seed=2).double()
    x0, eps = s.to_x0(p, torch.from_numpy(zt), TIMESTEPS).numpy(), s.to_epsilon(p, torch.from_numpy(zt), TIMESTEPS)
    eps = eps.numpy()
    np.testing.assert_allclose(np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps, zt, rtol=0, atol=1e-12)
    meant = {"epsilon": eps, "v_prediction": np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0, "sample": x0}[prediction]
    np.testing.assert_allclose(meant, p.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_round_trip_returns_clean_latents_and_noise(prediction):
    # Dividing by sqrt(abar) = 0.068 or, at t = 0, by sqrt(1 - abar) = 0.029 multiplies float32's rounding by up to 34.
    s, z0, noise = schedule(prediction), normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    zt, target = s.add_noise(z0, noise, TIMESTEPS), s.target(z0, noise, TIMESTEPS)
    torch.testing.assert_close(s.to_x0(target, zt, TIMESTEPS), z0, rtol=0, atol=2e-5)
    torch.testing.assert_close(s.to_epsilon(target, zt, TIMESTEPS), noise, rtol=0, atol=2e-5)


def test_noise_and_velocity_agree_with_diffusers():
    reference = DDPMScheduler(**STABLE_DIFFUSION)
    z0, noise = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    s = schedule("v_prediction", reference.alphas_cumprod)
    torch.testing.assert_close(s.add_noise(z0, noise, TIMESTEPS), reference.add_noise(z0, noise, TIMESTEPS))
    torch.testing.assert_close(s.target(z0, noise, TIMESTEPS), reference.get_velocity(z0, noise, TIMESTEPS))


def test_guidance_is_the_formula_and_scale_one_the_condition():
    c, u = normal(2, 4, 2, 2), normal(2, 4, 2, 2, seed=1)
    torch.testing.assert_close(guided(c, u, 7.5), 7.5 * c - 6.5 * u, rtol=0, atol=1e-5)
    torch.testing.assert_close(guided(c, u, 1.0), c, rtol=0, atol=1e-6)
    assert torch.equal(guided(c, u, 0.0), u)


def test_timesteps_like_fills_the_batch():
    t = timesteps_like(999, torch.zeros(3, 4, 2, 2))
    assert t.dtype == torch.int64
    assert t.tolist() == [999, 999, 999]


# --- timesteps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25, 1000])
def test_trailing_timesteps_are_diffusers(steps):
    assert trailing_timesteps(steps) == ddim(steps, "epsilon").timesteps.tolist()


@pytest.mark.parametrize(("last", "of"), [(1, 2), (2, 4), (3, 4), (1, 4), (5, 8), (20, 25)])
def test_strength_keeps_the_last_timesteps_of_a_longer_process(last, of):
    # The last k of N trailing timesteps are k steps at strength k / N; diffusers' img2img cuts its list so.
    assert trailing_timesteps(last, strength=last / of) == ddim(of, "epsilon").timesteps.tolist()[of - last :]


def test_strength_in_one_step():
    assert trailing_timesteps(1, strength=0.5) == [499]
    assert trailing_timesteps(1, strength=0.001) == [0]


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (-1, 1.0), (1001, 1.0), (2, 0.001), (1, 0.0001)])
def test_steps_that_do_not_fit_are_refused(steps, strength):
    with pytest.raises(InputError, match=f"{steps} steps do not fit"):
        trailing_timesteps(steps, strength=strength)


# --- sampling with a network ----------------------------------------------------------------------


@torch.no_grad()
def by_diffusers(unet, scheduler, z, text, timesteps):
    for t in timesteps:
        z = scheduler.step(unet(z, t, encoder_hidden_states=text).sample, t, z).prev_sample
    return z


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_is_diffusers_ddim(models, steps, prediction):
    denoiser, text, noise = models
    scheduler = ddim(steps, prediction)
    expected = by_diffusers(denoiser(prediction).unet, scheduler, noise, text, scheduler.timesteps)
    actual = denoise(denoiser(prediction), noise, TextConditioning(text), steps)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_is_diffusers_euler(models, prediction):
    denoiser, text, noise = models
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing", prediction_type=prediction)
    euler.set_timesteps(1)
    z = noise * euler.init_noise_sigma
    seen = euler.scale_model_input(z, euler.timesteps[0])
    with torch.no_grad():
        out = denoiser(prediction).unet(seen, euler.timesteps[0], encoder_hidden_states=text).sample
    expected = euler.step(out, euler.timesteps[0], z).prev_sample
    # Euler scales unit noise up by sigma = 14.6147 and down by sqrt(sigma^2 + 1), so that its network sees noise of
    # deviation 0.9977. Given that very noise, the one-step map is the same; given unit noise, it is 0.23 % away.
    assert seen.std().item() / noise.std().item() == pytest.approx(0.99767, abs=1e-5)
    torch.testing.assert_close(
        denoise(denoiser(prediction), seen, TextConditioning(text), 1), expected, rtol=1e-5, atol=1e-4
    )
    actual = denoise(denoiser(prediction), noise, TextConditioning(text), 1)
    assert ((actual - expected).norm() / expected.norm()).item() < 0.02
    assert ((actual - expected).norm() / expected.norm()).item() > 1e-4  # the difference is there, and known


@pytest.mark.parametrize(("last", "of"), [(1, 2), (2, 4), (3, 4)])
def test_from_a_picture_is_diffusers_image_to_image(models, last, of):
    denoiser, text, noise = models
    start, scheduler = normal(3, 4, 8, 8, seed=3), ddim(of, "epsilon")
    timesteps = scheduler.timesteps[of - last :]
    z = scheduler.add_noise(start, noise, timesteps[:1])
    expected = by_diffusers(denoiser("epsilon").unet, scheduler, z, text, timesteps)
    actual = denoise(denoiser("epsilon"), noise, TextConditioning(text), last, start=start, strength=last / of)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_strength_without_a_picture_changes_nothing(models):
    denoiser, text, noise = models
    full = denoise(denoiser("epsilon"), noise, TextConditioning(text), 1)
    assert torch.equal(denoise(denoiser("epsilon"), noise, TextConditioning(text), 1, strength=0.5), full)


def test_guided_sampling_is_diffusers_ddim_with_guided_predictions(models):
    denoiser, text, noise = models
    empty, scheduler = normal(3, 77, 32, seed=4), ddim(2, "v_prediction")
    model, z = denoiser("v_prediction"), noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, conditional = (model.unet(z, t, encoder_hidden_states=y).sample for y in (empty, text))
            z = scheduler.step(without + 7.5 * (conditional - without), t, z).prev_sample
    actual = denoise(model, noise, TextConditioning(text), 2, unconditional=TextConditioning(empty), guidance=7.5)
    # Guidance multiplies the rounding of both predictions, by 7.5 and by 6.5.
    torch.testing.assert_close(actual, z, rtol=1e-5, atol=1e-4)
