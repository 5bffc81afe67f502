"""The sampling benchmark at tiny scale: diffusers and the package sample the same image, and every variant is timed."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny

from benchmarks import measure, sample
from benchmarks.random_models import RandomModels
from echodistill_core.sampling import draw_noise


def test_all_variants_sample_the_same_image(monkeypatch):
    """diffusers starts from noise of standard deviation 0.9977, as it scales by (sigma^2 + 1)^-1/2."""
    family = RandomModels("tiny", torch.device("cpu")).family()
    sigma = float((1 / family.student.schedule.alphas_cumprod[-1] - 1).sqrt())
    scaled = draw_noise(family, 2, 64, 64, 0) * sigma / (sigma**2 + 1) ** 0.5
    monkeypatch.setattr(sample, "draw_noise", lambda *arguments: scaled)
    variants = sample.variants(family, AutoencoderTiny(latent_channels=4), 2)
    pipeline = sample.diffusers_pipeline(family)
    latents = draw_noise(family, 2, 64, 64, 0)
    expected = pipeline(
        [sample.PROMPT] * 2,
        num_inference_steps=1,
        guidance_scale=0.0,
        height=64,
        width=64,
        latents=latents,
        output_type="pt",
    ).images
    ours = (variants["ours"]() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(variants["ours"](), variants["ours, prompt kept"]())
    assert expected.std() > 0.01


def test_every_variant_is_timed_for_every_batch_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "cost", lambda work, device, *_: measure.cost(work, device, 1, 1))
    out = tmp_path / "figures.json"
    assert sample.main(["--batches", "1", "2", "--out", str(out)]) == 0
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert "images/s" in capsys.readouterr().out
    names = ("diffusers", "ours", "ours, prompt kept", "ours, TAESD")
    assert list(cells) == ["1", "2", "adapter"]
    assert all(tuple(cells[count]) == names for count in ("1", "2"))
    assert all(milliseconds > 0 for milliseconds in cells["adapter"].values())
    assert cells["2"]["ours"]["flop"] == pytest.approx(2 * cells["1"]["ours, prompt kept"]["flop"], rel=0.1)
