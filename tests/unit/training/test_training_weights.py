"""The weights that each choice of `trainable` trains, their low-rank and float32 forms, and their restoration."""

import pytest
import torch

from echodistill_core.models import layout
from echodistill_core.settings import TRAINABLE
from echodistill_core.training import session
from echodistill_core.training.events import StepDone
from echodistill_core.training.loop import adapters_of
from echodistill_core.training.steps import iterate
from echodistill_core.training.trainable import LowRank, TrainedWeights, trained_names


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
def test_restore_returns_every_weight(tiny_family, tiny_state, draw_batch, snapshot, changed, trainable, precision):
    family = tiny_family()
    before = snapshot(family)
    networks = (family.student.unet, family.teacher.unet, family.text.model, family.vae)
    names = [sorted(n for n, _ in network.named_parameters()) for network in networks]
    state = tiny_state(
        family, trainable=trainable, precision=precision, student_lr=1e-2, teacher_lr=1e-2, memory_mode="low"
    )
    iterate(state, draw_batch(state))
    assert changed(before, snapshot(family)) != set()
    for _ in range(2):  # a second call changes nothing
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
    before, during, backbone_tensors = snapshot(family), [], []

    def features():
        return {f"{r}/{n}": t.clone() for r, b in backbones.items() for n, t in b.state_dict().items()}

    def listen(event):
        if isinstance(event, StepDone):
            during.append(snapshot(family))
            backbone_tensors.append(features())

    train_tiny(tmp_path / "run", family, listen, iterations=3)
    kv = {f"{role}/{n}" for role in ("student", "teacher") for n in trained_names(getattr(family, role).unet, "kv")}
    assert len(kv) == 28
    assert [changed(before, d) for d in during] == [kv] * 3
    assert changed(during[0], during[2]) == kv
    assert changed(backbone_tensors[0], backbone_tensors[2]) == set()
    reference = load({"dino": "dino", "dinov2": "dinov2", "clip": "clip"}, "tiny")
    unused = {f"{r}/{n}": t for r, b in reference.items() for n, t in b.state_dict().items()}
    assert changed(backbone_tensors[2], unused) == set()
    assert changed(before, snapshot(family)) == set()
