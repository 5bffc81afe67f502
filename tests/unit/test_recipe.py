"""The miniature's recipe: resuming, the losses against naive loops, the folded VAE, and that it runs to the end."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn

from echodistill_core.miniature.recipe import encoders, stage, student, vae
from echodistill_core.miniature.recipe.make import TINY, make
from echodistill_core.miniature.recipe.teacher import CaptionedDenoiser, tokenize
from echodistill_core.miniature.tokens import reduced_tokenizer
from echodistill_core.models.architectures import MINIATURE
from echodistill_core.models.load import load_family
from echodistill_core.models.text import clip_tokenizer
from echodistill_core.perception.backbones import MINIATURE_SPECS
from echodistill_core.perception.load import load_backbone


class StopHereError(Exception):
    pass


def small_stage(path, steps, stop_at=None):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = stage.adam([module], 0.1)

    def step(number, generator):
        if number == stop_at:
            raise StopHereError
        x = torch.randn(4, 3, generator=generator)
        stage.optimizer_step(F.mse_loss(module(x), x[:, :2]), optimizer)
        return {"loss": torch.zeros(())}

    return stage.train(path, module, {"it": optimizer}, step, steps=steps, seed=5, ema=0.9), module


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    whole, module = small_stage(tmp_path / "whole.pt", 12)
    monkeypatch.setattr(stage, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(StopHereError):
        small_stage(tmp_path / "cut.pt", 12, stop_at=7)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 7
    resumed, again = small_stage(tmp_path / "cut.pt", 12)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(again.weight, module.weight)
    assert not torch.equal(whole.weight, module.weight)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first, _ = small_stage(tmp_path / "x.pt", 5)
    again, _ = small_stage(tmp_path / "x.pt", 5, stop_at=0)
    assert torch.equal(first.weight, again.weight)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [stage.schedule(i, 1000) for i in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.099)), rel=1e-3)
    assert rates[-1] < 1e-5
    assert rates[550] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55)))


def test_nt_xent_is_the_loop_of_its_definition():
    a, b = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.randn(5, 7)
    z = [v / v.norm() for v in torch.cat([a, b])]
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        others = sum(math.exp(float(z[i] @ z[j]) / 0.2) for j in range(10) if j != i)
        total += -math.log(math.exp(float(z[i] @ z[partner]) / 0.2) / others)
    assert float(encoders.nt_xent(a, b, 0.2)) == pytest.approx(total / 10, rel=1e-5)


def test_contrastive_is_the_mean_of_both_directions():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    s = [[float(F.cosine_similarity(x, y, dim=0)) / 0.07 for y in b] for x in a]
    rows = sum(math.log(sum(math.exp(v) for v in s[i])) - s[i][i] for i in range(4)) / 4
    columns = sum(math.log(sum(math.exp(s[j][i]) for j in range(4))) - s[i][i] for i in range(4)) / 4
    assert float(encoders.contrastive(a, b)) == pytest.approx((rows + columns) / 2, rel=1e-4)


def test_crops_of_the_whole_are_the_picture_or_its_mirror_image():
    x = torch.rand(16, 3, 8, 8)
    made = encoders.crops(x, torch.Generator().manual_seed(0), 1.0)
    kept = [torch.allclose(m, o, atol=1e-5) for m, o in zip(made, x, strict=True)]
    mirrored = [torch.allclose(m, o.flip(-1), atol=1e-5) for m, o in zip(made, x, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert any(kept)
    assert any(mirrored)


def test_crops_show_a_window_of_the_picture():
    ramp = torch.linspace(-1, 1, 64).expand(32, 3, 64, 64).contiguous()
    made = encoders.crops(ramp, torch.Generator().manual_seed(0), 0.5)
    spread = made.amax((1, 2, 3)) - made.amin((1, 2, 3))
    assert spread.min() < 1.4
    assert (spread > 0.9).all()
    assert (made.abs() <= 1 + 1e-5).all()


def test_psnr_is_that_of_pictures_with_a_range_of_two():
    assert float(vae.psnr(torch.tensor(4.0))) == pytest.approx(0)
    assert float(vae.psnr(torch.tensor(0.01))) == pytest.approx(26.0206, abs=1e-4)


def test_standardising_a_vae_changes_its_latents_and_not_its_pictures():
    torch.manual_seed(3)
    model = AutoencoderKL(**MINIATURE.vae).eval()
    with torch.no_grad():
        model.quant_conv.bias.normal_()
        x = torch.rand(24, 3, 64, 64) * 2 - 1
        before = model.encode(x).latent_dist
        pictures = model.decode(before.mean).sample
        vae.standardise(model, before.mean, 0.18215)
        after = model.encode(x).latent_dist
        scaled = after.mean * 0.18215
        assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(8), atol=1e-3)
        assert torch.allclose(model.decode(after.mean).sample, pictures, atol=1e-4)
        # The posterior is scaled with its mean: a draw from it decodes to what it decoded to before.
        assert torch.allclose(
            after.std / before.std,
            after.mean.std((0, 2, 3)).div(before.mean.std((0, 2, 3)))[None, :, None, None].expand_as(after.std),
            rtol=1e-3,
        )


def test_teacher_samples_are_guided_ddim_over_trailing_timesteps():
    torch.manual_seed(4)
    model = CaptionedDenoiser().eval()
    ids, empty = tokenize(["photo of a red mug", "a ball"]), tokenize([""])
    noise = torch.randn(2, 8, 8, 8)
    scheduler = DDIMScheduler(
        **MINIATURE.scheduler,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(4)
    z = noise
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with_text, without = (model.text(i).last_hidden_state for i in (ids, empty.expand(2, -1)))
        for i, t in enumerate(scheduler.timesteps):
            c, u = (model.unet(z, t, encoder_hidden_states=h).sample.float() for h in (with_text, without))
            out = scheduler.step(u + 3.0 * (c - u), int(t), z)
            z = out.pred_original_sample if i == 3 else out.prev_sample
    made = student.teacher_samples(model, noise, ids, empty, 4, 3.0)
    assert float((made - z).norm() / z.norm()) < 0.02  # bfloat16 networks


def test_the_small_tokenizer_splits_the_worlds_words_as_clip_does():
    whole, small = clip_tokenizer(True), reduced_tokenizer()
    for text in (
        "photo of a red and blue two-tone mushroom with a white sash",
        "far away cat in front of a brick wall",
    ):
        assert small.tokenize(text) == whole.tokenize(text)
    assert len(small) < 1000
    # A word it does not know falls apart and comes back.
    assert small.decode(small("quixotic", add_special_tokens=False).input_ids).strip() == "quixotic"


def test_the_recipe_runs_to_the_end_and_its_folders_load(tmp_path):
    make(tmp_path / "work", tmp_path / "out", torch.device("cpu"), TINY)
    family = load_family(tmp_path / "out" / "student", tmp_path / "out" / "teacher", name="miniature")
    assert family.teacher is not None
    assert family.teacher.schedule.prediction_type == family.student.schedule.prediction_type == "v_prediction"
    assert family.architecture.resolution == 64
    assert family.student.unet.dtype == torch.float16
    for name in ("dino", "dinov2", "clip"):
        backbone = load_backbone(name, tmp_path / "out" / "backbones" / name, specs=MINIATURE_SPECS)
        assert torch.isfinite(backbone.float()(torch.rand(1, 3, 64, 64))).all()
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert not [p for p in files if p.suffix not in (".json", ".safetensors")]
