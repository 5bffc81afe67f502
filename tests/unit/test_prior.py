"""Prior preservation: the class images, their loss term, and that prior_weight 0 changes nothing."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from run_files import silent, stop_at, tree

from echodistill_core.adapter.apply import personalised
from echodistill_core.concept.images import ImageSet
from echodistill_core.errors import InputError
from echodistill_core.sampling import sample
from echodistill_core.settings import EchoSettings, TrainSettings
from echodistill_core.training import session
from echodistill_core.training.batches import TrainingImages
from echodistill_core.training.events import PoolProgress, StepDone
from echodistill_core.training.identity import fingerprint_of
from echodistill_core.training.pools import load_or_generate_pool
from echodistill_core.training.prior import PRIOR_SEED
from echodistill_core.training.run import open_run
from echodistill_core.training.steps import student_step, teacher_step

ONLY_TEACHER = {"alignment_weight": 0.0, "adversarial_weight": 0.0}
ONLY_STUDENT = {**ONLY_TEACHER, "teacher_weight": 0.0, "student_reconstruction_weight": 1.0}


def class_images(count=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 64, 64), dtype=np.uint8)
    return ImageSet(torch.from_numpy(pixels), tuple(map(str, range(count))), ("photo of a dog",) * count)


def give(state, role, images):
    settings = TrainSettings(batch_size=1, augment=False, flip=False)
    state.prior[role] = TrainingImages(images, settings, 8, roles=(role,))
    return state


# --- who has it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ({}, ()),
        ({"prior_weight": 1.0}, ("teacher",)),
        ({"prior_weight": 0.1, "student_reconstruction_weight": 1.0}, ("teacher", "student")),
        ({"prior_weight": 1.0, "teacher_weight": 0.0}, ()),
        ({"prior_weight": 1.0, "trainable": "full", **ONLY_STUDENT}, ("student",)),
        ({"prior_weight": 1.0, "trainable": "token", **ONLY_STUDENT}, ()),
    ],
)
def test_the_prior_applies_to_roles_that_train_weights_by_reconstruction(overrides, roles):
    assert TrainSettings(**overrides).prior_roles == roles


def test_without_prior_weight_no_class_images_are_made(train_tiny, tiny_state, tmp_path):
    state = tiny_state(**ONLY_TEACHER)
    assert set(state.random.generators) == {"data", "noise"}
    assert state.prior == {}
    run = train_tiny(tmp_path / "run", **ONLY_TEACHER)
    assert not (run.folder / "prior").exists()
    assert set(run.read_log("distil")[0]) == {"step", "recon_teacher", "grad_norm_teacher"}


# --- the images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "steps", "guidance"), [("student", 1, 1.0), ("teacher", 25, 7.5)])
def test_class_images_are_what_the_untrained_model_makes_of_the_class(
    train_tiny, tiny_family, tmp_path, role, steps, guidance
):
    events = []
    settings = ONLY_STUDENT if role == "student" else ONLY_TEACHER
    run = train_tiny(
        tmp_path / "run", listen=events.append, prior_weight=1.0, prior_images=2, seed=5, iterations=1, **settings
    )
    made = [e for e in events if isinstance(e, PoolProgress)]
    assert [(e.done, e.size, e.name) for e in made] == [(i, 2, f"{role}'s class images") for i in (1, 2)]
    assert events.index(made[-1]) < next(i for i, e in enumerate(events) if isinstance(e, StepDone))
    assert sorted(p.name for p in (run.folder / "prior").iterdir()) == [role]
    with personalised(tiny_family(), role=role) as model:
        for i, prompt in enumerate(("photo of a dog", "photo of the dog")):
            expected = sample(model, [prompt], seed=5 + PRIOR_SEED + i, steps=steps, guidance=guidance)[0]
            with Image.open(run.folder / "prior" / role / f"{i:03d}.png") as picture:
                stored = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert ((expected + 1) * 127.5 - stored).abs().max().item() < 0.52


def test_a_run_stopped_anywhere_ends_the_same(train_tiny, tmp_path):
    overrides = {"prior_weight": 1.0, "prior_images": 3, "iterations": 2, **ONLY_STUDENT}
    whole = tree(train_tiny(tmp_path / "whole", **overrides).folder)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", listen=stop_at(PoolProgress, done=2), **overrides)
    first = tmp_path / "run" / "prior" / "student" / "000.png"
    when = first.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", listen=stop_at(StepDone, step=1), **overrides)
    assert first.stat().st_mtime_ns == when  # kept, not made again
    train_tiny(tmp_path / "run", **overrides)
    assert tree(tmp_path / "run") == whole


def test_class_images_that_were_changed_stop_the_run(train_tiny, tmp_path):
    overrides = {"prior_weight": 1.0, "prior_images": 2, **ONLY_STUDENT}

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", listen=stop_at(StepDone), **overrides)
    folder = tmp_path / "run" / "prior" / "student"
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    with pytest.raises(InputError, match="student was changed"):
        train_tiny(tmp_path / "run", **overrides)


def test_a_pool_is_refused_with_other_prompts_or_a_damaged_record(tmp_path):
    def generate(i):
        return torch.full((3, 8, 8), i / 2)

    prompts = ("photo of a dog", "photo of the dog")
    folder = tmp_path / "pool"
    pool = load_or_generate_pool(folder, prompts, generate, lambda event: None)
    assert pool.pixels.flatten(1).unique(dim=1).tolist() == [[128], [191]]
    with pytest.raises(InputError, match="holds a pool of other prompts"):
        load_or_generate_pool(folder, (*prompts[:1], "photo of a cat"), generate, lambda event: None)
    (folder / "pool.json").write_text("{")
    with pytest.raises(InputError, match=r"pool\.json cannot be read"):
        load_or_generate_pool(folder, prompts, generate, lambda event: None)


# --- the loss -------------------------------------------------------------------------------------


def first_gradient(state, role):
    """AdamW's first moment after its first step is 0.1 of the gradient that it was given."""
    moments = state.trainables.optimizers[role].state
    return (
        torch.cat([moments[p]["exp_avg"].flatten() for p in state.trainables.weights[role].parameters.values()]) / 0.1
    )


def step(state, role, batch):
    return teacher_step(state, batch) if role == "teacher" else student_step(state, batch)[0]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_loss_on_class_images_is_eq_1_done_by_hand_and_adds_to_the_gradient(tiny_state, draw_batch, role):
    own = {"teacher_weight": 0.5} if role == "teacher" else {"student_reconstruction_weight": 0.5}
    off = {**(ONLY_TEACHER if role == "teacher" else ONLY_STUDENT), **own, "grad_clip": 0.0}
    images = class_images()
    plain, state = tiny_state(**off), give(tiny_state(**off, prior_weight=0.7), role, images)

    # By hand, from the generator's own numbers: one for the choice of set, six of a view, then Eq. 1.
    generator = state.random.generators["prior"].clone_state()
    torch.rand(7, generator=generator)
    unet = getattr(state.family, role).unet
    with torch.no_grad():
        x = images.pixels.float() / 127.5 - 1
        posterior = state.family.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        z = z * state.family.vae.config.scaling_factor
    noise = torch.randn(z.shape, generator=generator)
    t = torch.randint(1000, (1,), generator=generator)
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    text = state.family.text(["photo of a dog"], state.trainables.token_embeddings[role]).detach()
    out = unet(ddpm.add_noise(z, noise, t), t, encoder_hidden_states=text).sample
    target = ddpm.get_velocity(z, noise, t) if role == "teacher" else noise
    loss = (out - target).pow(2).mean()
    parameters = list(state.trainables.weights[role].parameters.values())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    without, losses = (step(s, role, draw_batch(s)) for s in (plain, state))
    assert set(losses) - set(without) == {f"prior_{role}"}
    torch.testing.assert_close(losses[f"prior_{role}"], loss.detach(), rtol=1e-5, atol=1e-6)
    added = first_gradient(state, role) - first_gradient(plain, role)
    difference = (added - 0.5 * 0.7 * gradient).norm() / (0.35 * gradient.norm())
    assert difference.item() < 1e-4
    # What else is drawn does not notice.
    assert torch.equal(losses[f"recon_{role}"], without[f"recon_{role}"])
    for name, other in plain.random.generators.items():
        assert torch.equal(state.random.generators[name].get_state(), other.get_state())


def test_the_token_learns_nothing_from_class_images(tiny_state, draw_batch):
    gradients = []
    for weight in (0.0, 5.0):
        state = give(tiny_state(**ONLY_TEACHER, grad_clip=0.0, prior_weight=weight), "teacher", class_images())
        step(state, "teacher", draw_batch(state))
        gradients.append(
            state.trainables.optimizers["teacher"].state[state.trainables.token_embeddings["teacher"]]["exp_avg"]
        )
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


def test_every_class_image_is_seen_once_in_a_pass(tiny_state):
    state = give(tiny_state(prior_weight=1.0), "teacher", class_images(6))
    seen = torch.cat([state.prior["teacher"].draw(i, state.random.generators["prior"]).pixels for i in range(6)])
    assert len({bytes(x.numpy().tobytes()) for x in seen}) == 6


# --- through the stages, and runs from before -----------------------------------------------------


def test_the_echo_goes_on_with_the_same_class_images(train_tiny, tiny_family, tmp_path):
    run = train_tiny(tmp_path / "run", prior_weight=1.0, prior_images=2, **ONLY_STUDENT)
    before = tree(run.folder / "prior")
    session.echo(run, tiny_family(), EchoSettings(iterations=1, pool_size=1), silent)
    assert tree(run.folder / "prior") == before
    assert "prior_student" in run.read_log("echo")[0]


def test_a_run_from_before_there_was_the_setting_stays_what_it_was(train_tiny, tmp_path):
    folder = train_tiny(tmp_path / "run", iterations=1, **ONLY_STUDENT).folder
    record = json.loads((folder / "run.json").read_text())
    for part in ("identity", "settings"):
        for name in ("prior_weight", "prior_images"):
            del record[part][name]
    record["settings"]["preset"] = "tuned"  # whose values of today are no business of a run of yesterday
    del record["settings"]["memory_mode"]
    record["settings"]["gradient_checkpointing"] = True  # as memory was saved then
    record["fingerprint"] = fingerprint_of(record["identity"])
    (folder / "run.json").write_text(json.dumps(record))
    assert open_run(folder).settings.prior_weight == 0.0
    assert open_run(folder).settings.critic_canvas is True
    assert train_tiny(folder, iterations=1, **ONLY_STUDENT).fingerprint("distil") == record["fingerprint"]
    with pytest.raises(InputError, match=r"prior_weight is 0\.0 there and 0\.5 here"):
        train_tiny(folder, iterations=1, prior_weight=0.5, **ONLY_STUDENT)
