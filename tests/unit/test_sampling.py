"""Sampling against diffusers' pipelines on the same weights, and what a user relies on: seeds, sizes, strengths."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from echodistill_core.adapter.apply import personalised
from echodistill_core.errors import InputError
from echodistill_core.reporting import contact_sheet, plot_losses, save_picture, to_pictures
from echodistill_core.sampling import denoise, draw_noise, sample

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def family(tiny_family):
    return tiny_family()


@pytest.fixture(scope="module")
def draw(family):
    """draw(*prompts, role="student", **options): images of the family without adapters."""

    def make(*prompts, role="student", **options):
        with personalised(family, role=role) as model:
            return sample(model, prompts or [PROMPT], **options)

    return make


def reference(family, denoiser, noise, steps, guidance=0.0, prompt=PROMPT):
    """Latents of diffusers' pipeline with DDIM from unit noise, over trailing timesteps, down to abar = 1."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=denoiser.schedule.prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=family.vae,
        text_encoder=family.text.model,
        tokenizer=family.text.tokenizer,
        unet=denoiser.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [prompt] * len(noise),
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise.clone(),
        height=noise.shape[-2] * 8,
        width=noise.shape[-1] * 8,
        output_type="latent",
    ).images


def relative(a, b):
    return float((a - b).norm() / b.norm())


# Against diffusers


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_student_equals_diffusers_ddim_over_trailing_timesteps(family, steps):
    noise = draw_noise(family, 2, 64, 64, seed=1)
    found = denoise(family.student, noise, family.condition([PROMPT] * 2), steps)
    assert relative(found, reference(family, family.student, noise, steps)) < 1e-5


def test_teacher_with_guidance_equals_diffusers_over_25_steps(family):
    noise = draw_noise(family, 1, 64, 64, seed=1)
    text, empty = family.condition([PROMPT]), family.condition([""])
    found = denoise(family.teacher, noise, text, 25, unconditional=empty, guidance=7.5)
    expected = reference(family, family.teacher, noise, 25, guidance=7.5)
    assert relative(found, expected) < 1e-4
    unguided = denoise(family.teacher, noise, text, 25)
    assert relative(unguided, expected) > 1e-2  # guidance does something in this family


def test_sample_is_the_decoded_and_clamped_result(family, draw):
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    latents = reference(family, family.teacher, noise, 2, guidance=3.0)
    with torch.no_grad():
        expected = family.vae.decode(latents / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(draw(role="teacher", seed=3, steps=2, guidance=3.0), expected, rtol=0, atol=1e-3)


# Seeds, batches, sizes


def test_image_i_of_a_batch_is_the_image_of_seed_plus_i(draw):
    batch = draw(PROMPT, "a cat", "a boat", seed=40, steps=2)
    assert batch.shape == (3, 3, 64, 64)
    for i, prompt in enumerate((PROMPT, "a cat", "a boat")):
        alone = draw(prompt, seed=40 + i, steps=2)[0]
        torch.testing.assert_close(batch[i], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=0.05)


def test_noise_of_seed_plus_i_is_bit_equal_and_standard(family):
    noise = draw_noise(family, 3, 512, 512, seed=7)
    assert noise.shape == (3, 4, 64, 64)
    assert torch.equal(noise[2], draw_noise(family, 1, 512, 512, seed=9)[0])
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * noise.numel())


def test_each_image_may_have_a_seed_of_its_own(family, draw):
    noise = draw_noise(family, 3, 64, 64, seed=[5, 90, 5])
    assert torch.equal(noise[1], draw_noise(family, 1, 64, 64, seed=90)[0])
    assert torch.equal(noise[0], noise[2])
    batch = draw(PROMPT, PROMPT, seed=[90, 5])
    torch.testing.assert_close(batch[1:], draw(PROMPT, seed=5), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="2 seeds were given for 3 images"):
        draw(PROMPT, PROMPT, PROMPT, seed=[1, 2])


def test_same_seed_same_bits_and_the_global_generator_is_left_alone(draw):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(seed=2), first)
    assert not torch.equal(draw(seed=3), first)


def test_number_of_steps_matters(draw):
    one, two, four = (draw(steps=n) for n in (1, 2, 4))
    assert not torch.allclose(one, two, atol=0.05)
    assert not torch.allclose(two, four, atol=0.05)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (40, 72), (40, 8), (8, 136)])
def test_any_multiple_of_8_can_be_made(draw, width, height):
    images = draw(width=width, height=height)
    assert images.shape == (1, 3, height, width)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.std() > 0.01


def test_size_0_is_the_familys_own(draw):
    assert torch.equal(draw(width=0, height=0), draw(width=64, height=64))


@pytest.mark.parametrize(("width", "height"), [(60, 64), (64, 4), (-8, 64), (64, 513)])
def test_other_sizes_are_refused(draw, width, height):
    with pytest.raises(InputError, match=f"size {width}x{height} .* multiples of 8"):
        draw(width=width, height=height)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_other_numbers_of_steps_are_refused(draw, steps):
    with pytest.raises(InputError, match=f"{steps} steps do not fit"):
        draw(steps=steps)


def test_guidance_1_is_none_and_needs_no_second_pass(family, draw, monkeypatch):
    calls = []
    forward = type(family.student).predict
    monkeypatch.setattr(type(family.student), "predict", lambda *a: calls.append(1) or forward(*a))
    plain = draw(steps=2)
    assert len(calls) == 2
    guided = draw(steps=2, guidance=2.0)
    assert len(calls) == 2 + 4
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_sampling_leaves_no_graph(draw):
    assert not draw().requires_grad


# From a picture


@pytest.fixture(scope="module")
def source(family):
    """(a smooth picture, what the VAE alone makes of it)"""
    ramp = torch.linspace(-0.8, 0.8, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    with torch.no_grad():
        latents = family.vae.encode(picture).latent_dist.mean
        return picture, family.vae.decode(latents).sample.clamp(-1, 1)


def test_the_smaller_the_strength_the_closer_to_the_source(draw, source):
    picture, rebuilt = source
    strengths = (0.001, 0.01, 0.1, 0.5, 1.0)
    distances = [float((draw(image=picture, strength=s, seed=4) - rebuilt).square().mean()) for s in strengths]
    assert distances == sorted(distances)
    # An untrained decoder spreads the little noise that is left, so this is no small number.
    assert distances[0] < 0.5 * distances[-1]


def test_full_strength_keeps_next_to_nothing_of_the_source(draw, source):
    from_picture, from_noise = draw(image=source[0], seed=4), draw(seed=4)
    other = draw(image=source[0], seed=5)
    assert relative(from_picture, from_noise) < 0.2 * relative(from_picture, other)


@pytest.mark.parametrize(
    ("steps", "strength", "timesteps"), [(1, 0.5, [499]), (2, 0.5, [499, 249]), (4, 1.0, [999, 749, 499, 249])]
)
def test_a_picture_is_noised_to_the_first_timestep_and_denoised_from_there(family, source, steps, strength, timesteps):
    # By hand, with the schedule written out, in the order of Song et al. (2021), eq. 12 with eta 0.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    noise = draw_noise(family, 1, 64, 64, seed=6)
    start, text = family.encode(source[0]), family.condition([PROMPT])
    z = abar[timesteps[0]].sqrt() * start + (1 - abar[timesteps[0]]).sqrt() * noise
    for i, t in enumerate(timesteps):
        with torch.no_grad():
            eps = family.student.unet(z.float(), t, encoder_hidden_states=text.features).sample
        clean = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        if i + 1 < len(timesteps):
            after = abar[timesteps[i + 1]]
            z = after.sqrt() * clean + (1 - after).sqrt() * eps
    found = denoise(family.student, noise, text, steps, start=start, strength=strength)
    assert relative(found.double(), clean) < 1e-5


def test_one_picture_serves_a_whole_batch(draw, source):
    batch = draw(PROMPT, PROMPT, image=source[0], strength=0.3, seed=4)
    assert batch.shape == (2, 3, 64, 64)
    torch.testing.assert_close(batch[1:], draw(image=source[0], strength=0.3, seed=5), rtol=0, atol=1e-4)


def test_steps_that_do_not_fit_the_strength_are_refused(draw, source):
    draw(image=source[0], strength=0.004, steps=4)
    with pytest.raises(InputError, match=r"5 steps .* strength 0\.004: expected 1 to 4"):
        draw(image=source[0], strength=0.004, steps=5)
    with pytest.raises(InputError, match=r"1 steps .* strength 0\.0001"):
        draw(image=source[0], strength=0.0001)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, math.nan])
def test_other_strengths_are_refused(draw, source, strength):
    with pytest.raises(InputError, match="strength is"):
        draw(image=source[0], strength=strength)


def test_a_picture_of_another_size_is_refused(draw, source):
    with pytest.raises(InputError, match="64x64; expected 96x64"):
        draw(image=source[0], strength=0.5, width=96)


# As pictures


def test_pictures_hold_rounded_8_bit_values():
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0, 1.5])
    picture = to_pictures(levels.expand(1, 3, 1, 6))[0]
    assert (picture.size, picture.mode) == ((6, 1), "RGB")
    assert [picture.getpixel((x, 0))[1] for x in range(6)] == [0, 0, 64, 128, 255, 255]


def test_channels_rows_and_columns_stay_in_place():
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 0, 1, 2] = 1.0
    picture = to_pictures(image)[0]
    assert picture.getpixel((2, 1)) == (255, 0, 0)
    assert sum(picture.getpixel((x, y)) != (0, 0, 0) for x in range(3) for y in range(2)) == 1


def test_contact_sheet_shows_every_image_between_white_gaps():
    images = torch.stack([torch.full((3, 16, 16), v) for v in (-1.0, -0.5, 0.0, 0.5, 0.25)])
    sheet = contact_sheet(images)
    assert sheet.size == (4 * 20 + 4, 2 * 20 + 4)
    centres = [(12 + 20 * (i % 4), 12 + 20 * (i // 4)) for i in range(5)]
    assert [sheet.getpixel(c)[0] for c in centres] == [0, 64, 128, 191, 159]
    assert sheet.getpixel((1, 1)) == sheet.getpixel((22, 30)) == (255, 255, 255)


def test_pictures_are_written_in_the_format_of_their_name(tmp_path):
    from PIL import Image

    picture = to_pictures(torch.zeros(1, 3, 8, 8))[0]
    for name, kind in {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "A.PNG": "PNG"}.items():
        save_picture(tmp_path / name, picture)
        with Image.open(tmp_path / name) as opened:
            assert (opened.format, opened.size) == (kind, (8, 8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.PNG", "a.jpg", "a.png", "a.webp"]


def test_losses_of_one_step_negative_or_missing_ones_are_plotted(tmp_path):
    from PIL import Image

    rows = [{"step": 1, "mse": 1.0}, {"step": 2, "mse": -0.5, "late": 0.0}]
    plot_losses(rows, tmp_path / "losses.png", "a run")
    with Image.open(tmp_path / "losses.png") as opened:
        assert opened.format == "PNG"
        assert opened.width > 800
        assert len(opened.convert("L").getcolors()) > 20  # axes and letters, not an empty sheet
    plot_losses([], tmp_path / "none.png", "nothing yet")
    assert not (tmp_path / "none.png").exists()
