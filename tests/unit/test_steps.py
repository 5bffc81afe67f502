"""Algorithm 1's three steps: what each changes, what each term's gradient reaches, and the sums done by hand."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from echodistill_core.losses.ms_swd import ms_swd_along
from echodistill_core.models.architectures import TINY
from echodistill_core.perception.backbones import Backbone
from echodistill_core.training import steps
from echodistill_core.training.build import needed_backbones
from echodistill_core.training.schedule import loss_schedule
from echodistill_core.training.state import TrainState
from echodistill_core.training.steps import critic_step, extract_features, iterate, student_step, teacher_step

ALL_TERMS = {
    "teacher_weight": 0.0,
    "alignment_weight": 1.0,
    "identity_weight": 0.0,
    "mse_weight": 0.0,
    "swd_weight": 0.0,
    "adversarial_weight": 1.0,
    "dino_weight": 0.0,
    "dinov2_weight": 0.0,
    "clip_weight": 0.0,
}
STUDENT_TERMS = {
    "identity": {"identity_weight": 1.0},
    "mse": {"mse_weight": 1.0},
    "swd": {"swd_weight": 0.1},
    "adv_dino": {"dino_weight": 1.0},
    "adv_dinov2": {"dinov2_weight": 1.0},
    "adv_clip": {"clip_weight": 1.0},
    "recon_student": {"student_reconstruction_weight": 1.0},
}


def only(**weights):
    """Settings with every term off but these; without decay a tensor changes only where a gradient reaches it."""
    return {**ALL_TERMS, "weight_decay": 0.0, **weights}


def keys_and_values(state, role):
    unet = getattr(state.family, role).unet
    return {
        f"{role}/{name}.{leaf}.weight"
        for name, module in unet.named_modules()
        if name.endswith("attn2")
        for leaf in ("to_k", "to_v")
        if getattr(module, leaf).weight.shape[1] == TINY.text_width
    }


@contextmanager
def watched(monkeypatch, denoiser):
    """Every call of denoiser.predict: its inputs, its output, and whether gradients were on."""
    calls, predict = [], type(denoiser).predict

    def spy(self, zt, t, text):
        out = predict(self, zt, t, text)
        if self is denoiser:
            if out.requires_grad:
                out.retain_grad()
            calls.append(SimpleNamespace(zt=zt, t=t, text=text, out=out, graded=torch.is_grad_enabled()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(denoiser), "predict", spy)
        yield calls


def looks_at(monkeypatch, seen):
    """Add a backbone's name to `seen` whenever it looks at images."""
    forward = Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, *args, **more: seen.append(self.spec.name) or forward(self, *args, **more)
    )


def first_gradients(state, name):
    """The gradients that an optimiser's first step was given: AdamW's first moment after it is 0.1 of them."""
    moments = state.trainables.optimizers[name].state
    return torch.cat([moments[p]["exp_avg"].flatten() for p in state.trainables.parameters(name)]) / 0.1


# --- which tensors a step changes -----------------------------------------------------------------


def test_tiny_family_has_keys_and_values_to_train(tiny_state):
    state = tiny_state()
    for role in ("teacher", "student"):
        assert len(keys_and_values(state, role)) == 2 * 7
        assert {f"{role}/{n}" for n in state.trainables.weights[role].parameters} == keys_and_values(state, role)


@pytest.mark.parametrize("shared", [True, False])
def test_each_step_changes_its_own_tensors_and_no_bit_of_another(tiny_state, draw_batch, snapshot, changed, shared):
    state = tiny_state(share_text_encoder=shared, weight_decay=0.0)
    rows = {"rows/teacher", "rows/student"}
    for step in range(2):
        batch = draw_batch(state, step)
        before = snapshot(state)
        teacher_step(state, batch)
        after_teacher = snapshot(state)
        _, made = student_step(state, batch)
        after_student = snapshot(state)
        critic_step(state, batch, made)
        after_critics = snapshot(state)
        own_row = rows if shared else {"rows/teacher"}
        assert changed(before, after_teacher) == keys_and_values(state, "teacher") | own_row
        own_row = set() if shared else {"rows/student"}
        assert changed(after_teacher, after_student) == keys_and_values(state, "student") | own_row
        heads = {f"critics/{n}" for n in state.trainables.critics.state_dict()}
        assert changed(after_student, after_critics) == heads
        assert len(heads) == 3 * 4


@pytest.mark.parametrize("term", STUDENT_TERMS)
def test_each_term_alone_reaches_every_student_key_and_value_only(tiny_state, draw_batch, snapshot, changed, term):
    # teacher_weight keeps the token the teacher's; teacher_step itself is not called here.
    state = tiny_state(**only(teacher_weight=1.0, **STUDENT_TERMS[term]))
    batch, before = draw_batch(state), snapshot(state)
    losses, _ = student_step(state, batch)
    assert term in losses
    assert changed(before, snapshot(state)) == keys_and_values(state, "student")
    assert all(p.grad is None for p in state.trainables.parameters("student"))
    family = state.family
    for module in (family.student.unet, family.teacher.unet, family.text, family.vae, *state.backbones.values()):
        assert all(p.grad is None for p in module.parameters())
    assert all(
        p.grad is None for p in [*state.trainables.token_embeddings.values(), *state.trainables.critics.parameters()]
    )


@pytest.mark.parametrize("term", sorted(set(STUDENT_TERMS) - {"student"}))
def test_each_terms_own_gradient_is_finite_at_every_student_key_and_value(tiny_state, draw_batch, term):
    state = tiny_state(**only(teacher_weight=1.0, **STUDENT_TERMS[term]))
    student_step(state, draw_batch(state))
    moments = state.trainables.optimizers["student"].state
    assert len(moments) == 2 * 7
    assert all(m["exp_avg"].norm() > 0 and torch.isfinite(m["exp_avg"]).all() for m in moments.values())
    assert not state.trainables.optimizers["teacher"].state
    assert not state.trainables.optimizers["critics"].state


@pytest.mark.parametrize("role", ["dino", "dinov2", "clip"])
def test_each_critic_alone_trains_only_its_head(tiny_state, draw_batch, snapshot, changed, role):
    state = tiny_state(**only(**{f"{role}_weight": 1.0}))
    batch = draw_batch(state)
    _, made = student_step(state, batch)
    before = snapshot(state)
    losses = critic_step(state, batch, made)
    assert set(losses) == {f"critic_{role}", "grad_norm_critics"}
    names = {f"critics/{role}.{layer}.{leaf}" for layer in ("hidden", "output") for leaf in ("weight", "bias")}
    assert changed(before, snapshot(state)) == names


def test_critics_compare_photographs_with_what_the_student_made(tiny_state, draw_batch):
    state = tiny_state(critic_canvas=False)
    batch = draw_batch(state)
    _, made = student_step(state, batch)
    expected = {}
    with torch.no_grad():
        for role, head in state.trainables.critics.items():
            backbone = state.backbones[role]
            real, fake = head(backbone(batch.real, False)), head(backbone(made.pixels, False))
            p_real, p_fake = real.softmax(1)[:, 1], fake.softmax(1)[:, 1]
            expected[f"critic_{role}"] = (-p_real.log().mean() - (1 - p_fake).log().mean()) / 2
    losses = critic_step(state, batch, made)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)


# --- the token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ({}, set()),
        ({"share_text_encoder": False}, {"rows/student"}),
        ({"teacher_weight": 0.0}, {"rows/teacher", "rows/student"}),  # one and the same tensor
        ({"teacher_weight": 0.0, "share_text_encoder": False}, {"rows/student"}),
        ({"trainable": "kv", "teacher_weight": 0.0}, set()),
    ],
)
def test_student_changes_the_token_only_where_no_teacher_owns_it(
    tiny_state, draw_batch, snapshot, changed, overrides, learns
):
    state = tiny_state(weight_decay=0.0, **overrides)
    batch, before = draw_batch(state), snapshot(state)
    student_step(state, batch)
    assert {n for n in changed(before, snapshot(state)) if n.startswith("rows/")} == learns


def test_student_reads_the_token_that_the_teacher_has_just_learned(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(token_lr=1e-2)
    batch = draw_batch(state)
    before = state.condition(batch.student_prompts, "student").features.detach().clone()
    teacher_step(state, batch)
    with watched(monkeypatch, state.family.student) as calls:
        student_step(state, batch)
    assert len(calls) == 1
    assert not calls[0].text.features.requires_grad
    assert not torch.equal(calls[0].text.features, before)
    assert torch.equal(calls[0].text.features, state.condition(batch.student_prompts, "teacher").features)


def test_vocabulary_is_not_touched(tiny_state, draw_batch, snapshot, changed):
    state = tiny_state(vectors=3)
    before = snapshot(state)
    for step in range(2):
        iterate(state, draw_batch(state, step))
    names = changed(before, snapshot(state))
    assert state.trainables.token_embeddings["teacher"].shape == (3, TINY.text_width)
    assert "rows/teacher" in names
    assert not [n for n in names if n.startswith(("text/", "vae/"))]


# --- the teacher's loss ---------------------------------------------------------------------------


def test_teachers_loss_has_no_gradient_outside_the_mask(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(batch_size=4)
    batch = draw_batch(state)
    assert 0 < batch.mask.mean().item() < 1
    with watched(monkeypatch, state.family.teacher) as calls:
        teacher_step(state, batch)
    gradient, mask = calls[0].out.grad, batch.mask.expand(-1, 4, -1, -1).bool()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_teachers_loss_ignores_the_photograph_outside_the_mask(tiny_state, draw_batch, monkeypatch):
    # A UNet's receptive field reaches over the mask, so for this test each latent is predicted from itself alone.
    state = tiny_state(batch_size=2, grad_clip=0.0)
    batch = draw_batch(state)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 1:7], mask[1, :, :, 4:] = 1, 1
    batch = replace(batch, mask=mask)
    factor = state.trainables.weights["teacher"].parameters[
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ]

    def pointwise(self, zt, t, text):
        return zt * factor.sum() + text.features.square().mean()

    monkeypatch.setattr(type(state.family.teacher), "predict", pointwise)
    monkeypatch.setattr(state.trainables.optimizers["teacher"], "step", lambda: None)
    generators = {n: g.get_state() for n, g in state.random.generators.items()}

    def loss_and_gradients(latents):
        for name, generator in state.random.generators.items():
            generator.set_state(generators[name])
        monkeypatch.setattr(state.family, "scaled", lambda posterior, noise: latents)
        gradients = {}
        monkeypatch.setattr(
            state.trainables.optimizers["teacher"],
            "step",
            lambda: gradients.update(
                k=factor.grad.clone(), row=state.trainables.token_embeddings["teacher"].grad.clone()
            ),
        )
        return teacher_step(state, batch)["recon_teacher"], gradients

    loss, gradients = loss_and_gradients(z)
    outside, inside = z + 100 * (1 - mask), z + 0.1 * mask
    loss_outside, gradients_outside = loss_and_gradients(outside)
    assert torch.equal(loss_outside, loss)
    assert torch.equal(gradients_outside["k"], gradients["k"])
    assert torch.equal(gradients_outside["row"], gradients["row"])
    loss_inside, gradients_inside = loss_and_gradients(inside)
    assert not torch.equal(loss_inside, loss)
    assert not torch.equal(gradients_inside["k"], gradients["k"])


def test_teacher_learns_with_the_captions_of_its_views_and_timesteps_of_the_whole_range(
    tiny_state, draw_batch, monkeypatch
):
    state = tiny_state(batch_size=4, **only(teacher_weight=1.0))
    timesteps = []
    for step in range(12):
        batch = draw_batch(state, step)
        with torch.no_grad():
            text = state.condition(batch.prompts, "teacher")
        with watched(monkeypatch, state.family.teacher) as calls:
            teacher_step(state, batch)
        assert torch.equal(calls[0].text.features, text.features)
        timesteps += calls[0].t.tolist()
    assert len(timesteps) == 48
    assert min(timesteps) < 150  # each bound is missed by 48 uniform draws with a chance of 0.0004
    assert max(timesteps) > 850
    assert len(set(timesteps)) > 35


# --- the alignment --------------------------------------------------------------------------------


@pytest.mark.parametrize("by_t", [True, False])
def test_alignment_asks_the_teacher_as_the_method_says(tiny_state, draw_batch, monkeypatch, by_t):
    state = tiny_state(batch_size=3, alignment_by_t=by_t, **only(teacher_weight=1.0, mse_weight=1.0))
    batch = draw_batch(state)
    family = state.family
    with watched(monkeypatch, family.teacher) as teacher, watched(monkeypatch, family.student) as student:
        losses, made = student_step(state, batch)
    assert len(teacher) == len(student) == 1
    asked, one_step = teacher[0], student[0]
    # The student: one step from the noise at t = 999, with abar_999 = 0.0046601.
    ddpm = DDPMScheduler(**TINY.scheduler)
    abar = ddpm.alphas_cumprod
    noise = one_step.zt
    assert one_step.t.tolist() == [999] * 3
    expected = (noise - (1 - abar[999]).sqrt() * one_step.out) / abar[999].sqrt()
    torch.testing.assert_close(made.latents, expected, rtol=1e-5, atol=1e-5)
    # The teacher: those latents re-noised with the same noise, once without words and once with, in one batch.
    t = asked.t[:3]
    zt = ddpm.add_noise(made.latents.detach(), noise, t)
    torch.testing.assert_close(asked.zt, torch.cat([zt, zt]), rtol=1e-5, atol=1e-5)
    assert torch.equal(asked.t[3:], t)
    assert len(set(t.tolist())) == 3
    with torch.no_grad():
        text = torch.cat(
            [family.text([""]).expand(3, -1, -1), state.condition(batch.student_prompts, "teacher").features]
        )
    assert torch.equal(asked.text.features, text)
    # Detached altogether.
    assert not asked.graded
    assert not any(x.requires_grad for x in (asked.zt, asked.text.features, asked.out))
    # Guidance 7.5, clean latents from the velocity, and c(t) = abar_t for each sample on its own.
    without, conditional = asked.out.chunk(2)
    v, signal = without + 7.5 * (conditional - without), abar[t].reshape(3, 1, 1, 1)
    clean = signal.sqrt() * zt - (1 - signal).sqrt() * v
    each = (made.latents - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(losses["mse"], each.mean().detach(), rtol=1e-4, atol=0)
    weighted = ((abar[t] if by_t else torch.ones(3)) * each).mean().detach()
    torch.testing.assert_close(losses["alignment"], weighted, rtol=1e-4, atol=0)


def test_alignment_is_the_weighted_sum_of_its_terms_for_each_sample(tiny_state, draw_batch, monkeypatch):
    weights = {"identity_weight": 0.7, "mse_weight": 0.2, "swd_weight": 0.3}
    state = tiny_state(batch_size=3, **{**only(teacher_weight=1.0), **weights})
    batch, terms = draw_batch(state), {}
    for name in ("identity_loss", "latent_mse", "ms_swd_along"):
        original = getattr(steps, name)

        def keep(*args, original=original, name=name, **kwargs):
            terms[name] = original(*args, **kwargs)
            return terms[name]

        monkeypatch.setattr(steps, name, keep)
    with watched(monkeypatch, state.family.teacher) as calls:
        losses, _ = student_step(state, batch)
    c = DDPMScheduler(**TINY.scheduler).alphas_cumprod[calls[0].t[:3]]
    expected = sum(c[i] * (0.7 * terms["identity_loss"][i] + 0.2 * terms["latent_mse"][i]) for i in range(3))
    expected = (expected + (c * 0.3 * terms["ms_swd_along"]).sum()) / 3
    torch.testing.assert_close(losses["alignment"], expected.detach(), rtol=1e-5, atol=1e-7)


def test_guidance_scale_one_follows_the_condition_alone(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(guidance_scale=1.0, **only(teacher_weight=1.0, mse_weight=1.0))
    with watched(monkeypatch, state.family.teacher) as calls:
        losses, made = student_step(state, draw_batch(state))
    signal = DDPMScheduler(**TINY.scheduler).alphas_cumprod[calls[0].t[0]]
    clean = signal.sqrt() * calls[0].zt[1:] - (1 - signal).sqrt() * calls[0].out[1:]
    torch.testing.assert_close(losses["mse"], (made.latents - clean).square().mean().detach(), rtol=1e-4, atol=0)


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


# --- what is switched off costs nothing -----------------------------------------------------------

FULL = {
    *(
        "recon_teacher",
        "grad_norm_teacher",
        "identity",
        "mse",
        "swd",
        "alignment",
        "grad_norm_student",
        "grad_norm_critics",
    ),
    *(f"{what}_{role}" for what in ("adv", "critic") for role in ("dino", "dinov2", "clip")),
}
ALIGNMENT = {"identity", "mse", "swd", "alignment"}
ADVERSARIAL = {n for n in FULL if n.startswith(("adv_", "critic_", "grad_norm_critics"))}
CRITICS = {"dino", "dinov2", "clip"}


@pytest.mark.parametrize(
    ("off", "names_gone", "backbones", "teacher_calls", "student_decodes"),
    [
        ((), set(), CRITICS, 2, 2),
        (("teacher_weight",), {"recon_teacher", "grad_norm_teacher"}, CRITICS, 1, 2),
        (("alignment_weight",), ALIGNMENT, CRITICS, 1, 1),
        (("identity_weight", "mse_weight", "swd_weight"), ALIGNMENT, CRITICS, 1, 1),
        (("teacher_weight", "alignment_weight"), ALIGNMENT | {"recon_teacher", "grad_norm_teacher"}, CRITICS, 0, 1),
        (("adversarial_weight",), ADVERSARIAL, {"clip"}, 2, 2),
        (("adversarial_weight", "identity_weight"), ADVERSARIAL | {"identity"}, set(), 2, 2),
        (("identity_weight",), {"identity"}, CRITICS, 2, 2),
        (("mse_weight",), {"mse"}, CRITICS, 2, 2),
        (("swd_weight",), {"swd"}, CRITICS, 2, 2),
        (("identity_weight", "swd_weight"), {"identity", "swd"}, CRITICS, 2, 1),
        (("identity_weight", "swd_weight", "adversarial_weight"), ADVERSARIAL | {"identity", "swd"}, set(), 2, 0),
        (("dino_weight",), {"adv_dino", "critic_dino"}, {"dinov2", "clip"}, 2, 2),
        (("dinov2_weight",), {"adv_dinov2", "critic_dinov2"}, {"dino", "clip"}, 2, 2),
        (("clip_weight",), {"adv_clip", "critic_clip"}, CRITICS, 2, 2),
        (("clip_weight", "identity_weight"), {"adv_clip", "critic_clip", "identity"}, {"dino", "dinov2"}, 2, 2),
        (
            ("alignment_weight", "adversarial_weight"),
            ALIGNMENT | ADVERSARIAL | {"grad_norm_student"},
            set(),
            1,
            0,
        ),
    ],
)
def test_a_weight_of_zero_removes_the_term_and_its_cost(
    tiny_family, tiny_state, draw_batch, monkeypatch, off, names_gone, backbones, teacher_calls, student_decodes
):
    weights = dict.fromkeys(off, 0.0)
    without_teacher = teacher_calls == 0
    state = tiny_state(tiny_family(teacher=None) if without_teacher else None, **weights)
    assert set(needed_backbones(state.settings)) == set(state.backbones) == backbones
    batch, calls, decoded = draw_batch(state), [], []
    if not without_teacher:
        predict = type(state.family.teacher).predict
        monkeypatch.setattr(
            type(state.family.teacher),
            "predict",
            lambda self, *args: calls.append(self is state.family.teacher) or predict(self, *args),
        )
    decode = state.family.decode
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    losses = iterate(state, batch)
    assert set(losses) == FULL - names_gone
    assert sum(calls) == teacher_calls
    assert len(decoded) == student_decodes
    assert all(torch.isfinite(v).all() and v.ndim == 0 and not v.requires_grad for v in losses.values())


def test_critics_look_at_the_students_image_once(tiny_state, draw_batch, monkeypatch):
    # The student's pass and the critics' share its features: three backbones, twice each, and CLIP on the teacher's.
    state = tiny_state()
    seen = []
    looks_at(monkeypatch, seen)
    iterate(state, draw_batch(state))
    assert sorted(seen) == ["clip"] * 3 + ["dino"] * 2 + ["dinov2"] * 2


def test_between_their_turns_critics_neither_count_nor_cost_nor_learn(
    tiny_state, draw_batch, monkeypatch, snapshot, changed
):
    """Over four iterations with a turn in every other one: the turns' terms and draws are those of a run without."""
    plain, state = tiny_state(), tiny_state(critic_every=2)
    seen = []
    looks_at(monkeypatch, seen)
    for step in range(4):
        plain.step = state.step = step
        seen.clear()
        before = snapshot(state)
        losses = iterate(state, draw_batch(state))
        if step % 2 == 0:
            assert set(losses) == FULL
            assert sorted(seen) == ["clip"] * 3 + ["dino"] * 2 + ["dinov2"] * 2
            assert any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        else:
            assert set(losses) == FULL - ADVERSARIAL
            assert seen == ["clip"] * 2  # of Eq. 2
            assert not any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        if step == 0:
            assert losses == iterate(plain, draw_batch(plain))


def test_between_comparisons_of_images_only_latents_are_compared(
    tiny_state, draw_batch, monkeypatch, snapshot, changed
):
    """A comparison in every third iteration, and critics in every second of these: the rest is as without the terms."""
    seeing = {"identity_weight": 0.0, "swd_weight": 0.0, "adversarial_weight": 0.0}
    blind, state = tiny_state(**seeing), tiny_state(image_every=3, critic_every=2)
    assert loss_schedule(state.settings).period == 6
    decode, decoded, seen = state.family.decode, [], []
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    looks_at(monkeypatch, seen)
    names = {}
    for state.step in range(7):
        decoded.clear()
        seen.clear()
        before = snapshot(state)
        names[state.step] = set(iterate(state, draw_batch(state)))
        assert len(decoded) == (2 if state.step % 3 == 0 else 0)
        assert (seen != []) is (state.step % 3 == 0)
        critics = any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        assert critics is (state.step % 6 == 0)
    latents = FULL - ADVERSARIAL - {"identity", "swd", "alignment"}
    assert names == {i: FULL if i % 6 == 0 else FULL - ADVERSARIAL if i == 3 else latents for i in range(7)}

    # From the same start, an iteration between comparisons is one of the setting without the terms that see images.
    state = tiny_state(image_every=3)
    state.step = blind.step = 1
    losses, others = iterate(state, draw_batch(state)), iterate(blind, draw_batch(blind))
    assert losses == {name: loss for name, loss in others.items() if name != "alignment"}
    differing = changed(snapshot(state), snapshot(blind))
    assert not any(name.startswith(("student/", "teacher/", "rows/", "text/")) for name in differing)


def test_where_nothing_compares_latents_the_student_rests_between_comparisons(
    tiny_state, draw_batch, snapshot, changed
):
    state = tiny_state(image_every=2, mse_weight=0.0)
    state.step = 1
    before = snapshot(state)
    assert set(iterate(state, draw_batch(state))) == {"recon_teacher", "grad_norm_teacher"}
    assert not any(name.startswith(("student/", "critics/")) for name in changed(before, snapshot(state)))


def test_without_alignment_the_student_rests_between_the_critics_turns(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(alignment_weight=0.0, critic_every=2)
    with watched(monkeypatch, state.family.student) as calls:
        for state.step in range(2):
            iterate(state, draw_batch(state))
            assert len(calls) == 1


def test_without_terms_that_see_images_nothing_is_decoded_between_the_critics_turns(
    tiny_state, draw_batch, monkeypatch
):
    state = tiny_state(critic_every=3, identity_weight=0.0, swd_weight=0.0)
    decode, decoded = state.family.decode, []
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    for state.step in range(3):
        iterate(state, draw_batch(state))
    assert len(decoded) == 1


def test_the_small_dinov2_takes_the_larger_ones_place(tiny_state, draw_batch):
    state = tiny_state(dinov2_backbone="dinov2-small")
    assert needed_backbones(state.settings) == {"clip": "clip", "dino": "dino", "dinov2": "dinov2-small"}
    assert state.backbones["dinov2"].spec.name == "dinov2-small"
    losses = iterate(state, draw_batch(state))
    assert set(losses) == FULL
    large = tiny_state()
    others = iterate(large, draw_batch(large))
    assert losses["adv_dinov2"].item() != others["adv_dinov2"].item()
    assert losses["adv_dino"].item() == others["adv_dino"].item()


def test_a_teacher_that_predicts_noise_works_as_well(tiny_family, tiny_state, draw_batch, monkeypatch):
    family = tiny_family()
    schedule = replace(family.teacher.schedule, prediction_type="epsilon")
    family.teacher = replace(family.teacher, schedule=schedule)
    state = tiny_state(family, batch_size=2, augment=False, **only(teacher_weight=1.0, mse_weight=1.0))
    batch, noises = draw_batch(state), []
    original = TrainState.draw_noise
    monkeypatch.setattr(TrainState, "draw_noise", lambda *args: noises.append(original(*args)) or noises[-1])
    with watched(monkeypatch, family.teacher) as calls:
        losses = teacher_step(state, batch)
        student_losses, made = student_step(state, batch)
    learning, asked = calls
    torch.testing.assert_close(losses["recon_teacher"], (learning.out - noises[0]).square().mean().detach())
    abar = DDPMScheduler(**TINY.scheduler).alphas_cumprod[asked.t[:2]].reshape(2, 1, 1, 1)
    without, conditional = asked.out.chunk(2)
    eps = without + 7.5 * (conditional - without)
    clean = (asked.zt[:2] - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = (made.latents - clean).square().mean().detach()
    torch.testing.assert_close(student_losses["mse"], expected, rtol=1e-4, atol=0)
