"""Low memory mode, bf16 and devices."""

import re
import warnings

import pytest
import torch

from echodistill_core.devices import pick_device
from echodistill_core.training import build
from echodistill_core.training.loop import preview
from echodistill_core.training.steps import iterate


def test_low_memory_mode_computes_in_parts_and_recomputes_activations(tiny_state, draw_batch):
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


def test_low_memory_mode_keeps_one_unet_on_a_device_with_its_own_memory(
    tiny_family, tiny_state, draw_batch, monkeypatch
):
    """Offloaded parameters are empty, losses are bit-identical to those without offloading, and restore returns all."""
    expected = tiny_state(memory_mode="low", batch_size=2)
    losses = [iterate(expected, draw_batch(expected, step)) for step in range(2)]
    monkeypatch.setattr(build, "ONE_MEMORY", ())
    family = tiny_family()
    before = {n: t.clone() for n, t in family.student.unet.state_dict().items()}
    run = tiny_state(family, memory_mode="low", batch_size=2)
    unets = {"student": family.student.unet, "teacher": family.teacher.unet}
    away = []

    def record_empty(*_):
        away.append({role for role, unet in unets.items() if unet.conv_in.weight.numel() == 0})

    family.vae.decoder.conv_in.register_forward_hook(record_empty)
    for unet in unets.values():
        unet.mid_block.register_forward_hook(record_empty)
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
    assert len(said) == warned
    assert all(re.match("cpu has no instructions for bfloat16.*fp32", message) for message in said)
