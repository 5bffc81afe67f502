"""OneStepSample and LoadMiniature against ComfyUI's own nodes and against the core."""

from __future__ import annotations

import graphs
import pytest
import torch

from benchmarks import sample
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.sampling import denoise

PROMPT = "photo of a (red:1.2) mug on the beach"


def ours(info, prefix, *, image=None, **options):
    graph = {
        "models": graphs.MINIATURE,
        "sample": graphs.one_step(info, ["models", 0], ["models", 2], ["models", 3], **{"prompt": PROMPT, **options}),
        "keep": graphs.node("SaveLatent", samples=["sample", 1], filename_prefix=prefix),
        "show": graphs.node("PreviewImage", images=["sample", 0]),
    }
    if image is not None:
        graph["image"] = graphs.node("LoadImage", image=image)
        graph["sample"]["inputs"]["image"] = ["image", 0]
    return graph


def stock(info, prefix, steps, **options):
    chain = graphs.stock_chain(["models", 0], ["models", 2], PROMPT, steps, prefix=prefix, **options)
    decode = {
        "decode": graphs.node("VAEDecode", samples=["custom", 0], vae=["models", 3]),
        "show": graphs.node("PreviewImage", images=["decode", 0]),
    }
    return {"models": graphs.MINIATURE, **chain, **decode}


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 1), (4, 1), (1, 3)])
def test_it_is_bit_identical_to_the_stock_chain(server, info, base, steps, batch):
    name = f"{steps}x{batch}"
    mine = server.run(ours(info, f"ours{name}", steps=str(steps), batch_size=batch, seed=5))
    theirs = server.run(stock(info, f"stock{name}", steps, batch=batch, seed=5))
    assert not mine.error
    assert not theirs.error
    found, expected = graphs.saved_latent(base, f"ours{name}"), graphs.saved_latent(base, f"stock{name}")
    assert expected.shape == (batch, 8, 8, 8)
    assert torch.equal(found, expected)
    pictures = [[server.picture(i) for i in outcome.outputs["show"]["images"]] for outcome in (mine, theirs)]
    assert [graphs.pixels(p) for p in pictures[0]] == [graphs.pixels(p) for p in pictures[1]]


def test_from_a_picture_it_equals_the_stock_chain_too(server, info, base):
    """VAEEncode, SDTurboScheduler with denoise, SamplerCustom."""
    assert not server.run(ours(info, "i2i", image="mug/0.png", denoise=0.5, seed=3)).error
    graph = stock(info, "stocki2i", 1, denoise=0.5, seed=3, latent=["encoded", 0])
    graph["image"] = graphs.node("LoadImage", image="mug/0.png")
    graph["encoded"] = graphs.node("VAEEncode", pixels=["image", 0], vae=["models", 3])
    assert not server.run(graph).error
    assert torch.equal(graphs.saved_latent(base, "i2i"), graphs.saved_latent(base, "stocki2i"))


def test_the_miniature_draws_what_the_core_draws(server, info, base):
    """One step from the same noise, by ComfyUI's networks and algebra and by the core's own."""
    prompt = "photo of a red mug on the beach"
    assert not server.run(ours(info, "core", seed=8, prompt=prompt)).error
    family = open_family(ModelSources(family="miniature")).to("cpu", torch.float32)
    noise = torch.randn([1, 8, 8, 8], generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        drawn = denoise(family.student, noise, family.condition([prompt]), 1)
    expected = drawn / family.vae.config["scaling_factor"]
    assert torch.allclose(graphs.saved_latent(base, "core"), expected, atol=1e-4, rtol=1e-4)


def test_a_new_seed_runs_the_sampling_node_alone(server, info):
    """test_bridge checks that the prompt is not encoded again."""
    first = server.run(ours(info, "a", seed=1))
    second = server.run(ours(info, "a", seed=2))
    assert "models" in first.ran or "models" not in second.ran
    assert "sample" in second.ran
    assert "models" not in second.ran


@pytest.mark.parametrize(
    ("options", "words"),
    [({"denoise": 0.0}, "denoise is 0.0"), ({"denoise": 0.05}, "expected 0.1 or more")],
)
def test_a_denoise_without_steps_is_refused(server, info, options, words):
    assert words in server.run(ours(info, "no", **options)).error


def test_the_cost_of_a_prompt_outside_the_model_is_measured(server, monkeypatch):
    monkeypatch.setattr(sample, "REPEATS", 1)
    found = sample.comfyui_overhead(f"http://127.0.0.1:{server.port}")
    assert 0 < found["node"] < found["whole"]
    assert found["difference"] == pytest.approx(found["whole"] - found["node"])
