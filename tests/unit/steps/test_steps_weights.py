"""The weights of the terms, the clipping of gradients, and the settings that presets change."""

import pytest
import torch
import torch.nn.functional as F
from step_calls import FULL, first_gradients, only

from echodistill_core.losses.ms_swd import ms_swd_along
from echodistill_core.training import steps
from echodistill_core.training.build import needed_backbones
from echodistill_core.training.steps import extract_features, iterate, student_step, teacher_step

# --- weights of terms and clipping ----------------------------------------------------------------


def test_gradients_of_the_terms_add_up_with_their_weights(tiny_state, draw_batch):
    weights = {
        "identity_weight": 0.5,
        "mse_weight": 0.1,
        "swd_weight": 0.2,
        "dino_weight": 1.5,
        "dinov2_weight": 0.5,
        "clip_weight": 2.0,
    }
    outer = {"alignment_weight": 3.0, "adversarial_weight": 0.5}

    heads = {}

    def gradient(**overrides):
        state = tiny_state(grad_clip=0.0, **only(teacher_weight=1.0, **overrides))
        for role, head in state.trainables.critics.items():
            # A head's first weights depend on which others there are; here all have those of the first state.
            head.load_state_dict(heads.setdefault(role, head.state_dict()))
        student_step(state, draw_batch(state))
        return first_gradients(state, "student")

    total = gradient(**weights, **outer)
    alone = {n: gradient(**{n: 1.0}) for n in weights}
    factor = dict.fromkeys(("identity_weight", "mse_weight", "swd_weight"), outer["alignment_weight"])
    expected = sum(factor.get(n, outer["adversarial_weight"]) * w * alone[n] for n, w in weights.items())
    assert ((total - expected).norm() / expected.norm()).item() < 1e-4
    for n in weights:  # and each is a part that would be missed
        part = factor.get(n, outer["adversarial_weight"]) * weights[n] * alone[n]
        assert (part.norm() / expected.norm()).item() > 1e-3, n


def test_teacher_weight_scales_the_teachers_gradient(tiny_state, draw_batch):
    gradients = []
    for weight in (1.0, 3.0):
        state = tiny_state(grad_clip=0.0, teacher_weight=weight)
        teacher_step(state, draw_batch(state))
        gradients.append(first_gradients(state, "teacher"))
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("setting", "name"), [("grad_clip", "teacher"), ("grad_clip", "student"), ("critic_grad_clip", "critics")]
)
def test_clipping_limits_the_norm_that_is_reported_before_it(tiny_state, draw_batch, setting, name):
    norms = {}
    for limit in (0.0, 1e-3):
        state = tiny_state(**{setting: limit})
        losses = iterate(state, draw_batch(state))
        logged = losses[f"grad_norm_{name}"].item()
        norms[limit] = (first_gradients(state, name).norm().item(), logged)
    free, reported = norms[0.0]
    assert free == pytest.approx(reported, rel=1e-4)
    assert free > 1e-2
    limited, reported_again = norms[1e-3]
    assert limited == pytest.approx(1e-3, rel=1e-3)
    # Clipping one player's gradient changes what the next one sees by less than this.
    assert reported_again == pytest.approx(reported, rel=1e-2)


# --- what presets change --------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["dino", "dinov2", "clip"])
@pytest.mark.parametrize("normalise", [True, False])
def test_backbones_see_images_normalised_as_the_setting_says(tiny_state, role, normalise):
    state = tiny_state(backbone_normalisation=normalise)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prepared = F.interpolate(x, size=(32, 32), mode="bicubic", antialias=True)
    if normalise:
        from torchvision.transforms.functional import normalize

        mean, std = {  # as torchvision and open_clip publish them
            "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        }.get(role, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        prepared = normalize((prepared + 1) / 2, mean, std)
    backbone = state.backbones[role]
    with torch.no_grad():
        actual = extract_features(state, role, x)
        if role == "clip":
            expected = backbone.projector(backbone.encoder(prepared).image_embeds).flatten(1)
        else:
            expected = backbone.encoder(prepared).last_hidden_state[:, 0]
        other = backbone(x, not normalise)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - other).abs().max().item() > 1e-2


@pytest.mark.parametrize("unit", [True, False])
def test_swd_gets_the_range_that_the_setting_says(tiny_state, draw_batch, monkeypatch, unit):
    state = tiny_state(swd_unit_range=unit, **only(teacher_weight=1.0, swd_weight=0.1))
    seen = []

    def keep(a, b, *args, **kwargs):
        seen.extend([a, b])
        return ms_swd_along(a, b, *args, **kwargs)

    monkeypatch.setattr(steps, "ms_swd_along", keep)
    decoded = []
    decode = state.family.decode
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(decode(z)) or decoded[-1])
    student_step(state, draw_batch(state))
    for given, image in zip(seen, reversed(decoded), strict=True):
        assert torch.equal(given, image / 2 + 0.5 if unit else image) or torch.allclose(given, image / 2 + 0.5)
        assert torch.equal(given, image) is not unit
    assert not seen[1].requires_grad


@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_presets_reach_the_steps(tiny_state, draw_batch, preset):
    # With the same images and noise, what a preset changes shows in the terms it names and in no other.
    common = {"augment": False, "flip": False}
    paper, other = tiny_state(**common), tiny_state(preset=preset, **common)
    batch = draw_batch(paper)
    draw_batch(other)
    a, b = iterate(paper, batch), iterate(other, batch)
    same = {n for n in a if torch.equal(a[n], b[n])}
    unaffected = {"recon_teacher", "grad_norm_teacher", "mse", "swd"}
    assert same == (unaffected if preset == "tuned" else set(a))


def test_dinov2_small_replaces_dinov2(tiny_state, draw_batch):
    state = tiny_state(dinov2_backbone="dinov2-small")
    assert needed_backbones(state.settings) == {"clip": "clip", "dino": "dino", "dinov2": "dinov2-small"}
    assert state.backbones["dinov2"].spec.name == "dinov2-small"
    losses = iterate(state, draw_batch(state))
    assert set(losses) == FULL
    large = tiny_state()
    others = iterate(large, draw_batch(large))
    assert losses["adv_dinov2"].item() != others["adv_dinov2"].item()
    assert losses["adv_dino"].item() == others["adv_dino"].item()
