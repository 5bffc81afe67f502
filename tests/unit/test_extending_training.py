"""One new Python file adds a loss term or a critic; nothing else in the package changes."""

import importlib.util
import textwrap

import pytest
import torch

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.losses.objectives import LOSS_TERMS, LossTerm
from echodistill_core.models.hub import HUB
from echodistill_core.perception.backbones import SPECS, TINY_SPECS
from echodistill_core.settings import TrainSettings, affecting_result
from echodistill_core.training.identity import fingerprint_of
from echodistill_core.training.run import open_run
from echodistill_core.training.steps import iterate

LOSS = """
    from echodistill_core.losses.objectives import LOSS_TERMS, LossTerm

    def edge_loss(student, teacher):
        return sum((student.diff(dim=d) - teacher.diff(dim=d)).abs().mean(dim=(1, 2, 3)) for d in (-1, -2))

    LOSS_TERMS.register("edges", LossTerm("images", edge_loss))
    LOSS_TERMS.register("l1", LossTerm("latents", lambda student, teacher: (student - teacher).abs().mean((1, 2, 3))))
"""

CRITIC = """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from echodistill_core.models.hub import HUB, HubFiles
    from echodistill_core.perception.backbones import IMAGENET, SPECS, TINY_SPECS, BackboneSpec, vit_features

    SMALL = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32
    )
    SPEC = BackboneSpec("registers", "with registers", 32, *IMAGENET, Dinov2WithRegistersModel, SMALL, vit_features)
    HUB.register(SPEC.name, HubFiles("owner/repository", ("model.safetensors",), "Apache-2.0", "with attribution"))
    SPECS.register(SPEC.name, SPEC)
    TINY_SPECS.register(SPEC.name, SPEC)
"""


@pytest.fixture
def add(tmp_path):
    """add(source): import a temporary module; what it registers is removed after the test."""
    registries = (LOSS_TERMS, HUB, SPECS, TINY_SPECS)
    before = [set(registry) for registry in registries]

    def load(source):
        path = tmp_path / "my_part.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("my_part", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            registry.unregister(name)


def test_a_loss_term_is_trained_logged_and_recorded(add, photographs, tmp_path, capsys):
    add(LOSS)
    train = ["train", "--family", "tiny", "--photos", str(photographs), "--class-noun", "dog", "--iterations", "3"]
    options = ["--image-every", "2", "--extra-losses", "edges=0.5 l1=2", "--log-every", "1"]
    assert main([*train, *options, "--out", str(tmp_path / "run")]) == 0
    rows = open_run(tmp_path / "run").read_log("distil")
    assert ["edges" in row for row in rows] == [True, False, True]
    assert all(row["l1"] > 0 for row in rows)
    assert open_run(tmp_path / "run").settings.extra_loss_weights == {"edges": 0.5, "l1": 2.0}


def test_a_terms_gradient_is_added_to_eq_5_with_its_weight(add, tiny_state, draw_batch):
    """A registered copy of the latent MSE with weight 3 trains as mse_weight 3 does."""
    from echodistill_core.losses.objectives import latent_mse

    LOSS_TERMS.register("copy", LossTerm("latents", latent_mse))
    add("")
    off = {"identity_weight": 0.0, "swd_weight": 0.0, "adversarial_weight": 0.0}
    built_in = tiny_state(mse_weight=3.0, **off)
    registered = tiny_state(mse_weight=0.0, extra_losses="copy=3", **off)
    for step in range(2):
        first = iterate(built_in, draw_batch(built_in, step))
        second = iterate(registered, draw_batch(registered, step))
        for here, there in (("mse", "copy"), ("alignment", "alignment"), ("grad_norm_student", "grad_norm_student")):
            assert torch.equal(first[here], second[there])
    trained = registered.trainables.tensors()
    assert all(torch.equal(t, trained[n]) for n, t in built_in.trainables.tensors().items())
    LOSS_TERMS.unregister("copy")


def test_an_unknown_term_is_refused_before_training(train_tiny, tmp_path):
    with pytest.raises(InputError, match=r"extra_losses.*lpips"):
        train_tiny(tmp_path / "run", extra_losses="lpips=1")
    assert not (tmp_path / "run").exists()


def test_a_backbone_becomes_a_critic_that_learns(add, tiny_state, draw_batch):
    add(CRITIC)
    plain, more = tiny_state(), tiny_state(extra_critics="registers=0.5")
    assert set(more.backbones) - set(plain.backbones) == {"registers"}
    heads = {n: p.detach().clone() for n, p in more.trainables.critics.named_parameters()}
    others = dict(plain.trainables.critics.named_parameters())
    assert all(torch.equal(heads[n], p) for n, p in others.items())  # the paper's critics begin as without it
    losses = iterate(more, draw_batch(more))
    assert {"adv_registers", "critic_registers"} <= set(losses)
    after = dict(more.trainables.critics.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in heads.items() if n.startswith("registers"))


def test_a_critic_trains_from_the_command_line_and_the_run_resumes(add, photographs, tmp_path, capsys):
    add(CRITIC)
    command = ["train", "--family", "tiny", "--photos", str(photographs), "--class-noun", "dog", "--log-every", "1"]
    command += ["--iterations", "2", "--extra-critics", "registers=1", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert all(row["adv_registers"] > 0 for row in open_run(tmp_path / "run").read_log("distil"))
    assert main(command) == 0  # found finished


def test_an_unknown_critic_is_refused(photographs, tmp_path, capsys):
    command = ["train", "--family", "tiny", "--photos", str(photographs), "--class-noun", "dog", "--iterations", "1"]
    assert main([*command, "--extra-critics", "nothing=1", "--out", str(tmp_path / "run")]) != 0
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["step", "mse", "alignment", "adv_x", "a=b"])
def test_a_loss_term_cannot_take_a_column_of_the_log(name):
    with pytest.raises(InputError, match="loss term"):
        LOSS_TERMS.register(name, LossTerm("latents", lambda student, teacher: student.mean((1, 2, 3))))


@pytest.mark.parametrize("name", ["dino.v3", "keys", "a=b", "a b"])
def test_a_backbones_name_can_be_a_critics(name):
    with pytest.raises(InputError, match="backbone"):
        SPECS.register(name, SPECS["dino"])


def test_the_papers_critics_have_settings_of_their_own():
    with pytest.raises(InputError, match="dino_weight"):
        TrainSettings(extra_critics="dino=2")


def test_the_echo_of_a_run_whose_term_is_not_registered_changes_nothing(add, photographs, tmp_path, capsys):
    add(LOSS)
    command = ["train", "--family", "tiny", "--photos", str(photographs), "--class-noun", "dog", "--iterations", "1"]
    assert main([*command, "--extra-losses", "l1=1", "--out", str(tmp_path / "run")]) == 0
    record = (tmp_path / "run" / "run.json").read_bytes()
    part = LOSS_TERMS["l1"]
    LOSS_TERMS.unregister("l1")
    assert main(["echo", str(tmp_path / "run"), "--iterations", "1"]) != 0
    assert "l1" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").read_bytes() == record
    LOSS_TERMS.register("l1", part)


def test_settings_that_are_newer_than_the_first_runs_keep_their_fingerprints():
    """The literal is the fingerprint that these settings had before extra_losses and extra_critics."""
    assert fingerprint_of(affecting_result(TrainSettings(class_noun="dog"))) == "1b31685457547996"
    for name in ("extra_losses", "extra_critics"):
        assert name in affecting_result(TrainSettings(class_noun="dog", **{name: "part=1"}))
