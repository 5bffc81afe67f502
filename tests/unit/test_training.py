"""Whole stages on the tiny family: what learns, what stays, what repeats, what stops, and the echoing stage."""

import random
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from echodistill_core.adapter.apply import personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.concept.images import square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.devices import pick_device
from echodistill_core.errors import DivergedError, InputError
from echodistill_core.models import layout
from echodistill_core.sampling import sample
from echodistill_core.settings import TRAINABLE, EchoSettings
from echodistill_core.tensorfile import read_tensors
from echodistill_core.training import build, session, steps
from echodistill_core.training.batches import TrainingImages, batches
from echodistill_core.training.build import new_state
from echodistill_core.training.events import CheckpointSaved, LossesLogged, PreviewReady, StepDone, latest
from echodistill_core.training.loop import adapters_of, preview
from echodistill_core.training.run import open_run
from echodistill_core.training.samples import one_step_images
from echodistill_core.training.steps import iterate, teacher_step
from echodistill_core.training.trainable import LowRank, TrainedWeights, trained_names

TEACHER_ONLY = {"alignment_weight": 0.0, "adversarial_weight": 0.0, "augment": False, "flip": False}


def silent(event):
    pass


def files(run, stage="distil"):
    return {p.name: p.read_bytes() for p in sorted(run.path(stage).glob("*.safetensors"))}


# --- what learns ----------------------------------------------------------------------------------


def expected_names(unet, kind):
    """By module structure instead of by name: the weights of attention projections, or everything."""
    if kind == "full":
        return {n for n, _ in unet.named_parameters()}
    names = set()
    for path, module in unet.named_modules():
        if type(module).__name__ != "Attention":
            continue
        layers = {"to_q": module.to_q, "to_k": module.to_k, "to_v": module.to_v, "to_out.0": module.to_out[0]}
        if kind == "kv":
            layers = {n: layers[n] for n in ("to_k", "to_v") if module.is_cross_attention}
        if kind != "token":
            names |= {f"{path}.{leaf}.weight" for leaf in layers}
    return names


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_each_choice_of_trainable_trains_exactly_its_tensors(
    tiny_family, tiny_state, draw_batch, snapshot, changed, trainable
):
    kind, _, token = trainable.partition("+")
    token = token or kind == "token"
    state, plain = tiny_state(trainable=trainable, lora_rank=4), tiny_family()
    unets = {"teacher": plain.teacher.unet, "student": plain.student.unet}
    expected = {role: expected_names(unet, kind) for role, unet in unets.items()}
    before = snapshot(state)
    for step in range(2):
        iterate(state, draw_batch(state, step))
    found = {n for n in changed(before, snapshot(state)) if not n.startswith("critics/")}
    if kind == "lora":
        learned = {
            f"{role}/{n.removesuffix('.weight')}.parametrizations.weight.0.{factor}"
            for role in unets
            for n in expected[role]
            for factor in ("up", "down")
        }
    else:
        learned = {f"{role}/{n}" for role in unets for n in expected[role]}
    rows = {"rows/teacher", "rows/student"} if token else set()
    if kind == "full":
        # A bias that a norm takes out again has no gradient, and 0 has no decay.
        assert found <= learned | rows
        assert len(found) > 0.95 * len(learned | rows)
    else:
        assert found == learned | rows
    for role in unets:
        assert set(state.trainables.weights[role].base) == expected[role]
        assert len(state.trainables.parameters(role)) == len(expected[role]) * (2 if kind == "lora" else 1) + (
            1 if token and role == "teacher" else 0
        )


@pytest.mark.parametrize("kind", ["kv", "lora", "full"])
def test_learned_differences_are_those_of_the_effective_weights(tiny_state, draw_batch, kind):
    state = tiny_state(trainable=kind, lora_rank=3, student_lr=1e-3, teacher_lr=1e-3)
    original = state.trainables.weights["student"].base
    for step in range(2):
        iterate(state, draw_batch(state, step))
    adapters = adapters_of(state, "distil", 2)
    assert set(adapters) == {"student", "teacher"}
    for role, adapter in adapters.items():
        unet = getattr(state.family, role).unet
        own = {}
        for name in state.trainables.weights[role].base:
            path, _, leaf = name.rpartition(".")
            own[name] = getattr(unet.get_submodule(path), leaf).detach()
        names = layout.unet_names(own, state.family.architecture)
        deltas = adapter.all_deltas()
        assert set(deltas) == set(names.values())
        for name, effective in own.items():
            start = state.trainables.weights[role].base[name]
            torch.testing.assert_close(start + deltas[names[name]], effective, rtol=0, atol=1e-7)
            if kind == "lora":
                assert torch.linalg.matrix_rank(deltas[names[name]].double(), rtol=1e-5) <= 3
                assert adapter.factors[names[name]][0].shape[1] == 3
        assert max(d.abs().max().item() for d in deltas.values()) > 1e-4
        assert torch.equal(adapter.token_embeddings, state.trainables.token_embeddings[role].detach())
        assert (adapter.metadata["role"], adapter.metadata["stage"], adapter.metadata["iterations"]) == (
            role,
            "distil",
            "2",
        )
    assert len(original) > 0


def test_low_rank_updates_start_at_the_weight_and_are_no_larger_than_it():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    update = LowRank(weight, 16, torch.Generator().manual_seed(0))
    assert torch.equal(update(weight), weight)
    assert update.up.shape == (6, 4)
    assert update.down.shape == (4, 4)
    with torch.no_grad():
        update.up[0, 1] = 2.0
    expected = weight.clone()
    expected[0] += 2 * update.down[1].detach()
    torch.testing.assert_close(update(weight), expected)


@pytest.mark.parametrize("trainable", ["kv+token", "lora+token", "full+token"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_release_gives_back_every_weight(tiny_family, tiny_state, draw_batch, snapshot, changed, trainable, precision):
    family = tiny_family()
    before = snapshot(family)
    networks = (family.student.unet, family.teacher.unet, family.text.model, family.vae)
    names = [sorted(n for n, _ in network.named_parameters()) for network in networks]
    state = tiny_state(
        family, trainable=trainable, precision=precision, student_lr=1e-2, teacher_lr=1e-2, memory_mode="low"
    )
    iterate(state, draw_batch(state))
    assert changed(before, snapshot(family)) != set()
    for _ in range(2):  # twice is as good
        state.family.restore()
        assert changed(before, snapshot(family)) == set()
        assert [sorted(n for n, _ in network.named_parameters()) for network in networks] == names
        assert not any(p.requires_grad for network in networks for p in network.parameters())
        assert not any(network.training for network in networks)
        assert not any(getattr(m, "gradient_checkpointing", False) for network in networks for m in network.modules())
        assert family.text.placeholders == {}
        assert family.text.tokenize(["<new1>"]).max().item() < 49408


def test_weights_learn_in_the_same_order_after_another_run(tiny_family, tiny_state):
    # A checkpoint tells an optimiser's moments apart by their place.
    family = tiny_family()
    names = {kind: trained_names(family.student.unet, kind) for kind in TRAINABLE}
    tiny_state(family, trainable="lora").family.restore()
    assert {kind: trained_names(family.student.unet, kind) for kind in TRAINABLE} == names


def test_trained_weights_are_float32_in_a_half_precision_unet(tiny_family):
    unet = tiny_family().student.unet
    weights = TrainedWeights(unet, "kv", 4, torch.Generator())
    unet.to(torch.bfloat16)
    weights.install(torch.device("cpu"), torch.bfloat16)
    before = {n: p.detach().clone() for n, p in weights.parameters.items()}
    for name in trained_names(unet, "kv"):
        assert weights.parameters[name].dtype == torch.float32
        assert unet.get_parameter(name) is weights.working[name]
        assert unet.get_parameter(name).dtype == torch.bfloat16
    # An update that bfloat16 cannot tell from none is not lost, and a gradient arrives in float32.
    name = trained_names(unet, "kv")[0]
    weights.working[name].grad = torch.full_like(weights.working[name], 0.5)
    weights.grads_to_master()
    assert weights.working[name].grad is None
    assert torch.equal(weights.parameters[name].grad, torch.full_like(before[name], 0.5))
    with torch.no_grad():
        for _ in range(200):
            weights.parameters[name].add_(1e-3 * before[name])
    weights.sync_from_master()
    torch.testing.assert_close(weights.working[name].float(), 1.2 * before[name], rtol=2**-8, atol=1e-6)


def test_a_run_leaves_everything_frozen_bit_unchanged(
    tiny_family, train_tiny, snapshot, changed, tmp_path, monkeypatch
):
    family, backbones = tiny_family(), {}
    load = session.load_backbones
    monkeypatch.setattr(session, "load_backbones", lambda *args: backbones.update(load(*args)) or backbones)
    before, during, looks = snapshot(family), [], []

    def features():
        return {f"{r}/{n}": t.clone() for r, b in backbones.items() for n, t in b.state_dict().items()}

    def listen(event):
        if isinstance(event, StepDone):
            during.append(snapshot(family))
            looks.append(features())

    train_tiny(tmp_path / "run", family, listen, iterations=3)
    kv = {f"{role}/{n}" for role in ("student", "teacher") for n in trained_names(getattr(family, role).unet, "kv")}
    assert len(kv) == 28
    assert [changed(before, d) for d in during] == [kv] * 3
    assert changed(during[0], during[2]) == kv
    assert changed(looks[0], looks[2]) == set()
    reference = load({"dino": "dino", "dinov2": "dinov2", "clip": "clip"}, "tiny")
    unused = {f"{r}/{n}": t for r, b in reference.items() for n, t in b.state_dict().items()}
    assert changed(looks[2], unused) == set()
    assert changed(before, snapshot(family)) == set()


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trainable", "falls_below"), [("full+token", 0.5), ("kv+token", 0.97)])
def test_the_teachers_loss_falls_on_one_photograph(tiny_state, draw_batch, make_photographs, trainable, falls_below):
    settings = {**TEACHER_ONLY, "teacher_lr": 1e-3 if trainable.startswith("full") else 1e-2, "token_lr": 1e-2}
    state = tiny_state(trainable=trainable, batch_size=2, **settings)
    photographs = make_photographs(1)
    teacher, generator = state.family.teacher, torch.Generator().manual_seed(99)
    batch = draw_batch(state, 0, photographs)

    @torch.no_grad()
    def loss():
        # The same noise at sixteen timesteps, before and after.
        generator.manual_seed(99)
        z = state.family.encode(batch.pixels[:1]).expand(16, -1, -1, -1)
        noise, t = torch.randn(z.shape, generator=generator), torch.arange(30, 1000, 62)[:16]
        text = state.condition(["photo of a <new1> dog"], "teacher").expand(16)
        abar = teacher.schedule.alphas_cumprod[t].reshape(16, 1, 1, 1)
        v = teacher.unet(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, encoder_hidden_states=text.features).sample
        return (v - (abar.sqrt() * noise - (1 - abar).sqrt() * z)).square().mean().item()

    before = loss()
    for step in range(40):
        teacher_step(state, draw_batch(state, step, photographs))
    assert loss() < falls_below * before


def test_critics_learn_to_tell_photographs_from_a_student_that_stands_still(tiny_state, draw_batch):
    state = tiny_state(
        alignment_weight=0.0, teacher_weight=0.0, student_lr=0.0, token_lr=0.0, critic_lr=1e-3, weight_decay=0.0
    )
    losses = [iterate(state, draw_batch(state, step)) for step in range(30)]
    for role in ("dino", "dinov2", "clip"):
        first, last = (sum(row[f"critic_{role}"].item() for row in part) / 5 for part in (losses[:5], losses[-5:]))
        assert last < 0.7 * first
        # Which is what makes the student's own task harder.
        assert losses[-1][f"adv_{role}"] > losses[0][f"adv_{role}"]


# --- it repeats -----------------------------------------------------------------------------------


def test_same_seed_same_files_and_other_seed_others(train_tiny, photographs, tmp_path):
    first, again, other = (
        files(train_tiny(tmp_path / name, iterations=3, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert set(first) == {"student.safetensors", "teacher.safetensors", "checkpoint.safetensors"}
    assert first == again
    assert all(first[name] != other[name] for name in first)
    # And in a process of its own.
    program = f"""
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.settings import TrainSettings, from_options
from echodistill_core.training.session import train
sources = ModelSources(family="tiny")
settings = from_options(TrainSettings, {{
    "class_noun": "dog", "device": "cpu", "iterations": 3, "batch_size": 1, "swd_projections": 8, "seed": 5,
    "log_every": 2, "preview_every": 2, "checkpoint_every": 1,
}})
photographs = load_photographs({str(photographs)!r})
train(photographs, open_family(sources), settings, sources, {str(tmp_path / "child")!r}, lambda event: None)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    # Its logs, previews and checkpoints came at other times, which must not matter.
    assert files(open_run(tmp_path / "child")) == first


def test_training_draws_no_global_random_number(train_tiny, tiny_family, tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    run = train_tiny(tmp_path / "run", iterations=2, preview_every=1, trainable="lora+token")
    session.echo(run, tiny_family(), EchoSettings(iterations=1, pool_size=2), silent)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2][1]).all()  # noqa: NPY002


def test_the_global_seed_changes_nothing(tiny_state, draw_batch):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = tiny_state(trainable="lora+token")
        losses = [iterate(state, draw_batch(state, step)) for step in range(2)]
        results.append((losses, {n: t.clone() for n, t in state.trainables.tensors().items()}))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(t, results[1][1][n]) for n, t in results[0][1].items())


def test_the_largest_seed_works(tiny_state, draw_batch):
    state = tiny_state(seed=2**63 - 1)
    assert torch.isfinite(iterate(state, draw_batch(state))["alignment"])
    assert torch.isfinite(preview(state)).all()


def test_batches_drawn_ahead_are_those_drawn_in_turn_and_a_checkpoint_cannot_tell(photographs, quick_settings):
    images = square_images(load_photographs(photographs), 64, "center")
    source = TrainingImages(images, quick_settings(batch_size=2), 8)
    seen = {}
    for prefetch in (False, True):
        generator = torch.Generator().manual_seed(3)
        seen[prefetch] = [
            (batch.pixels, batch.real, batch.mask, batch.prompts, generator.get_state())
            for batch in batches(source, range(4, 9), generator, torch.device("cpu"), prefetch=prefetch)
        ]
    assert len(seen[True]) == 5
    for turn, early in zip(seen[False], seen[True], strict=True):
        assert turn[3] == early[3]
        assert all(torch.equal(a, b) for a, b in zip((*turn[:3], turn[4]), (*early[:3], early[4]), strict=True))
    assert list(batches(source, range(4, 4), generator, torch.device("cpu"), prefetch=True)) == []


def test_a_mistake_while_drawing_ahead_is_raised_at_its_batch(photographs, quick_settings):
    images = square_images(load_photographs(photographs), 64, "center")
    source = TrainingImages(images, quick_settings(), 8)

    class Broken(TrainingImages):
        def draw(self, step, generator):
            if step == 2:
                raise RuntimeError("no such photograph")
            return source.draw(step, generator)

    drawn = batches(
        Broken(images, quick_settings(), 8), range(5), torch.Generator(), torch.device("cpu"), prefetch=True
    )
    assert [len(next(drawn)), len(next(drawn))] == [1, 1]
    with pytest.raises(RuntimeError, match="no such photograph"):
        next(drawn)


def test_low_memory_mode_computes_in_parts_and_again_what_it_did_not_keep(tiny_state, draw_batch):
    seen = {mode: {"student": [], "decoder": [], "dinov2": []} for mode in ("normal", "low")}
    for mode, calls in seen.items():
        state = tiny_state(memory_mode=mode, batch_size=3)
        watched = {
            "student": state.family.student.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q,
            "decoder": state.family.vae.decoder.up_blocks[-1].resnets[0].conv1,
            "dinov2": state.backbones["dinov2"].encoder.encoder.layer[0].attention,
        }
        for name, module in watched.items():
            module.register_forward_pre_hook(lambda _, given, called=calls[name]: called.append(len(given[0])))
        iterate(state, draw_batch(state))
    # The teacher's image and the student's; the features of the image and of the photographs.
    assert seen["normal"] == {"student": [3], "decoder": [3, 3], "dinov2": [3, 3]}
    # For each image: the pass and its repetition; the teacher's image, the student's and its repetition.
    assert seen["low"] == {"student": [1] * 6, "decoder": [1] * 9, "dinov2": [1] * 6}


def test_low_memory_mode_holds_one_unet_on_a_device_with_memory_of_its_own(
    tiny_family, tiny_state, draw_batch, monkeypatch
):
    """Weights that are away hold no memory; losses are those of both at hand; afterwards everything is back."""
    expected = tiny_state(memory_mode="low", batch_size=2)
    losses = [iterate(expected, draw_batch(expected, step)) for step in range(2)]
    monkeypatch.setattr(build, "ONE_MEMORY", ())
    family = tiny_family()
    before = {n: t.clone() for n, t in family.student.unet.state_dict().items()}
    run = tiny_state(family, memory_mode="low", batch_size=2)
    unets = {"student": family.student.unet, "teacher": family.teacher.unet}
    away = []

    def look_around(*_):
        away.append({role for role, unet in unets.items() if unet.conv_in.weight.numel() == 0})

    family.vae.decoder.conv_in.register_forward_hook(look_around)
    for unet in unets.values():
        unet.mid_block.register_forward_hook(look_around)
    for step, wanted in enumerate(losses):
        found = iterate(run, draw_batch(run, step))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert {frozenset(a) for a in away} == {frozenset({"student"}), frozenset({"teacher"}), frozenset(unets)}
    preview(run)
    family.restore()
    assert all(torch.equal(t, before[n]) for n, t in family.student.unet.state_dict().items())
    assert not family.on_restore
    assert not family.teacher.unet._forward_pre_hooks


def test_bf16_agrees_with_fp32_within_its_rounding(tiny_state, draw_batch):
    losses = {}
    for precision in ("fp32", "bf16"):
        state = tiny_state(precision=precision, batch_size=2)
        losses[precision] = iterate(state, draw_batch(state))
        assert all(t.dtype == torch.float32 for t in state.trainables.tensors().values())
        assert {n: p.dtype for n, p in state.family.vae.named_parameters()}["decoder.conv_in.weight"] == (
            torch.float32 if precision == "fp32" else torch.bfloat16
        )
        assert all(torch.isfinite(v) for v in losses[precision].values())
    a, b = losses["fp32"], losses["bf16"]
    assert a.keys() == b.keys()
    # bf16 keeps 8 bits (0.4 %), and a loss sums many layers' rounding; norms of gradients go through all of them twice.
    for name in a:
        tolerance = 0.1 if name.startswith("grad_norm_") else 0.05
        # Features that turn by 2 % change 1 - cosine by 2e-4, which is much of it where both images are nearly alike.
        absolute = 4e-4 if name == "identity" else None
        assert b[name].item() == pytest.approx(a[name].item(), rel=tolerance, abs=absolute), name
    assert any(a[n].item() != b[n].item() for n in a)


# --- events and logs ------------------------------------------------------------------------------


def test_a_run_tells_its_listener_what_happens_and_when(train_tiny, tmp_path):
    events = []
    run = train_tiny(
        tmp_path / "run", listen=events.append, iterations=5, log_every=2, checkpoint_every=3, preview_every=4
    )
    done = [e for e in events if isinstance(e, StepDone)]
    assert [(e.stage, e.step, e.iterations) for e in done] == [("distil", i, 5) for i in range(1, 6)]
    logged = [[row["step"] for row in e.rows] for e in events if isinstance(e, LossesLogged)]
    assert [step for rows in logged for step in rows] == [1, 2, 3, 4, 5]
    assert logged[0] == [1, 2]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [3, 5]
    previews = [e for e in events if isinstance(e, PreviewReady)]
    assert [e.step for e in previews] == [4, 5]
    assert all(e.images.shape == (4, 3, 64, 64) and e.images.abs().max() <= 1 for e in previews)
    rows = run.read_log("distil")
    for event, row in zip(done, rows, strict=True):
        assert row == {"step": event.step, **{n: v.item() for n, v in event.losses.items()}}
    finished = run.record["finished"]["distil"]
    assert (finished["iterations"], finished["losses"]) == (5, rows[-1])


def test_a_finished_run_tells_the_last_value_of_every_term(train_tiny, tmp_path):
    """Whatever the turns of images: of five iterations, the first and the fourth compare them."""
    run = train_tiny(tmp_path / "run", iterations=5, image_every=3, log_every=1)
    rows, losses = run.read_log("distil"), run.record["finished"]["distil"]["losses"]
    assert ["swd" in row for row in rows] == [True, False, False, True, False]
    assert losses == {**rows[3], **rows[4]}
    assert (losses["step"], losses["swd"]) == (5, rows[3]["swd"])
    assert latest(rows[:2]) == {**rows[0], **rows[1]}


def test_a_finished_run_is_found_finished(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "run")
    before, events = files(run), []
    again = train_tiny(tmp_path / "run", listen=events.append)
    assert events == []
    assert files(again) == before


def test_a_listener_that_raises_stops_the_run_after_a_checkpoint(tiny_family, train_tiny, snapshot, changed, tmp_path):
    class CancelError(Exception):
        pass

    def cancel(event):
        if isinstance(event, StepDone) and event.step == 2:
            raise CancelError

    family = tiny_family()
    before = snapshot(family)
    with pytest.raises(CancelError):
        train_tiny(tmp_path / "run", family, cancel, iterations=4)
    assert changed(before, snapshot(family)) == set()
    run = open_run(tmp_path / "run")
    assert not run.is_finished("distil")
    assert set(files(run)) == {"checkpoint.safetensors"}
    assert [row["step"] for row in run.read_log("distil")] == [1, 2]
    whole = train_tiny(tmp_path / "whole", iterations=4)
    assert files(train_tiny(tmp_path / "run", iterations=4)) == files(whole)


def test_previews_are_samples_of_the_student_as_it_is(tiny_family, tiny_state, draw_batch):
    family = tiny_family()
    state = tiny_state(family, student_lr=1e-2)
    iterate(state, draw_batch(state))
    seen, adapter = preview(state), adapters_of(state, "distil", 1)["student"]
    many = one_step_images(state, ["a <new1> dog", "photo"], 3, 64)
    state.family.restore()
    plain = replace(family, text=tiny_family().text)
    with personalised(plain, [adapter]) as model:
        expected = sample(model, ["photo of a <new1> dog"] * 4, seed=state.settings.seed)
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
        expected = sample(model, ["a <new1> dog", "photo"], seed=3)
        torch.testing.assert_close(many, expected, rtol=0, atol=1e-4)
    with personalised(plain) as model:
        assert (sample(model, ["photo of a dog"]) - seen[:1]).abs().max().item() > 1e-2


# --- it stops -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_every", "value"), [(1, "nan"), (2, "nan"), (1, "inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny_family, train_tiny, snapshot, changed, tmp_path, monkeypatch, log_every, value
):
    calls, checkpoints, family = [], [], tiny_family()
    before, original = snapshot(family), steps.ms_swd_along

    def broken(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float(value) if len(calls) >= 3 else 1)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append((event.step, event.path.read_bytes()))

    monkeypatch.setattr(steps, "ms_swd_along", broken)
    settings = {"iterations": 4, "log_every": log_every, "checkpoint_every": 2}
    with pytest.raises(DivergedError, match=rf"^swd is {value} at step 3 of the stage distil"):
        train_tiny(tmp_path / "run", family, listen, **settings)
    assert [step for step, _ in checkpoints] == [2]
    run = open_run(tmp_path / "run")
    assert files(run) == {"checkpoint.safetensors": checkpoints[0][1]}
    assert not run.is_finished("distil")
    assert changed(before, snapshot(family)) == set()
    if log_every == 2 or value == "inf":
        return
    # Once the cause is gone it goes on from there, as if nothing had happened.
    monkeypatch.setattr(steps, "ms_swd_along", original)
    resumed = train_tiny(tmp_path / "run", **settings)
    assert files(resumed) == files(train_tiny(tmp_path / "whole", **settings))
    assert [row["step"] for row in resumed.read_log("distil")] == [1, 2, 3, 4]


def test_a_diverged_run_that_is_also_cancelled_keeps_its_checkpoint(train_tiny, tmp_path, monkeypatch):
    calls, checkpoints, original = [], [], steps.masked_mse

    def broken(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 3 else 1)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append(event.path.read_bytes())
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "masked_mse", broken)
    with pytest.raises((DivergedError, KeyboardInterrupt)):
        train_tiny(tmp_path / "run", listen=listen, iterations=6, log_every=10, checkpoint_every=2)
    assert files(open_run(tmp_path / "run")) == {"checkpoint.safetensors": checkpoints[-1]}


def test_weights_that_are_not_finite_are_never_saved(train_tiny, tmp_path, monkeypatch):
    states, checkpoints = [], []
    original = session.train_stage

    def keep(state, *args):
        states.append(state)
        return original(state, *args)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append(event.path.read_bytes())
        if isinstance(event, StepDone) and event.step == 2:
            next(iter(states[0].trainables.critics.parameters())).data[0, 0] = float("nan")

    monkeypatch.setattr(session, "train_stage", keep)
    with pytest.raises(DivergedError, match=r"critics/clip\.hidden\.weight is not finite after step 2"):
        train_tiny(tmp_path / "run", listen=listen, iterations=4, checkpoint_every=1)
    assert files(open_run(tmp_path / "run")) == {"checkpoint.safetensors": checkpoints[-1]}
    assert len(checkpoints) == 1


# --- ablations as settings, through the whole run -------------------------------------------------


def test_one_photograph_only(train_tiny, photographs, tmp_path):
    run = train_tiny(tmp_path / "run", max_photographs=1)
    assert run.record["photographs"] == ["0.png"]
    images = square_images(load_photographs([photographs / "0.png"]), 64, "center")
    assert torch.equal(run.photographs().pixels, images.pixels)
    # And it is the run of a folder with that photograph alone.
    alone = train_tiny(tmp_path / "alone", photographs=[photographs / "0.png"], max_photographs=1)
    assert files(alone) == files(run)


def test_without_a_teacher_only_the_student_and_its_token_learn(tiny_family, train_tiny, tmp_path):
    run = train_tiny(tmp_path / "run", tiny_family(teacher=None), teacher_weight=0.0, alignment_weight=0.0)
    assert set(files(run)) == {"checkpoint.safetensors", "student.safetensors"}
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    start = tiny_family().text.noun_embeddings("dog", 1)
    assert not torch.equal(adapter.token_embeddings, start)
    assert set(run.read_log("distil")[0]) == {
        *("step", "grad_norm_student", "grad_norm_critics"),
        *(f"{what}_{role}" for what in ("adv", "critic") for role in ("dino", "dinov2", "clip")),
    }


def test_a_text_encoder_of_its_own_gives_each_adapter_its_rows(train_tiny, tmp_path):
    shared, own = (
        train_tiny(tmp_path / name, share_text_encoder=flag) for name, flag in (("shared", True), ("own", False))
    )
    rows = {
        (name, role): read_adapter(run.path("distil", f"{role}.safetensors")).token_embeddings
        for name, run in (("shared", shared), ("own", own))
        for role in ("student", "teacher")
    }
    assert torch.equal(rows["shared", "student"], rows["shared", "teacher"])
    assert not torch.equal(rows["own", "student"], rows["own", "teacher"])
    assert torch.equal(rows["own", "teacher"], rows["shared", "teacher"])  # the teacher does not notice
    keys = [n for n in read_tensors(own.path("distil", "checkpoint.safetensors")) if n.startswith("rows/")]
    assert sorted(keys) == ["rows/student", "rows/teacher"]


def test_baselines_are_the_same_loop_with_one_term(train_tiny, tmp_path):
    run = train_tiny(
        tmp_path / "run",
        trainable="token",
        teacher_weight=0.0,
        alignment_weight=0.0,
        adversarial_weight=0.0,
        student_reconstruction_weight=1.0,
    )
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    assert adapter.all_deltas() == {}
    assert set(run.read_log("distil")[0]) == {"step", "recon_student", "grad_norm_student"}


def test_several_rows_start_at_the_mean_of_the_noun(tiny_state):
    state = tiny_state(vectors=3, class_noun="coffee mug")
    table, tokenizer = state.family.text.table, state.family.text.tokenizer
    ids = tokenizer("coffee mug", add_special_tokens=False).input_ids
    assert len(ids) == 2
    expected = (table[ids[0]] + table[ids[1]]) / 2
    torch.testing.assert_close(state.trainables.token_embeddings["teacher"].data, expected.expand(3, -1))
    assert state.trainables.token_embeddings["student"] is state.trainables.token_embeddings["teacher"]


# --- what is refused before anything is computed --------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"class_noun": "  "}, "class_noun is empty"),
        ({"resolution": 60}, "resolution is 60; expected 64 or more"),
        ({"resolution": 68}, "resolution is 68; .*multiple of 8"),
        ({"placeholder": "dog"}, "already a word"),
        ({"device": "quantum"}, "device 'quantum' cannot be used"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(train_tiny, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        train_tiny(tmp_path / "run", **overrides)
    assert not (tmp_path / "run" / "distil").exists()


def test_a_teacher_or_backbone_that_is_missing_is_named(tiny_family, quick_settings):
    family = tiny_family()
    family.text = family.text.with_placeholders({"<new1>": 1})
    with pytest.raises(InputError, match="need the backbone clip"):
        new_state(family, {}, quick_settings())
    with pytest.raises(InputError, match="need a teacher"):
        new_state(replace(family, teacher=None), {}, quick_settings())


@pytest.mark.parametrize(
    "off",
    [
        {"trainable": "kv"},
        {"trainable": "token", "student_reconstruction_weight": 0.0},
        # The student's own matrices are frozen, and its rows are no token that learns.
        {"trainable": "full", "adversarial_weight": 1.0, "dino_weight": 0.0, "dinov2_weight": 0.0, "clip_weight": 0.0},
    ],
)
def test_a_run_in_which_nothing_would_learn_is_refused(tiny_state, off):
    with pytest.raises(InputError, match=f"nothing would learn with trainable {off['trainable']}"):
        tiny_state(**{"teacher_weight": 0.0, "alignment_weight": 0.0, "adversarial_weight": 0.0, **off})


def test_a_token_alone_learns_from_whoever_learns(tiny_state):
    assert len(tiny_state(trainable="token", teacher_weight=0.0).trainables.parameters("student")) == 1
    state = tiny_state(trainable="token")
    assert (len(state.trainables.parameters("student")), len(state.trainables.parameters("teacher"))) == (0, 1)


def test_training_works_inside_inference_mode(train_tiny, tiny_family, tmp_path):
    # As in programs that switch gradients off for everything they run.
    expected = files(train_tiny(tmp_path / "outside"))
    with torch.inference_mode():
        assert files(train_tiny(tmp_path / "inside")) == expected


def test_devices_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False), ("SVE256", False)])
def test_bf16_on_a_cpu_without_instructions_for_it_works_and_says_so(tiny_state, monkeypatch, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tiny_state(precision="bf16")
        tiny_state(precision="fp32")
    assert state.family.vae.dtype == torch.bfloat16
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    expected = "cpu has no instructions for bfloat16: precision bf16 halves memory there, but fp32 is faster."
    assert said == [expected] * warned
