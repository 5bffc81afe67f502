"""Fingerprints of weights: the same for the same model, another for any layer that differs, and cheap at full size."""

import json

import pytest
import torch
from checkpoints import checkpoint_parts, single_file, write_folder
from run_files import StopError, stop_at

from echodistill_core.adapter.apply import block_mismatch, personalised
from echodistill_core.adapter.file import read_adapter
from echodistill_core.diffusion import NoiseSchedule
from echodistill_core.errors import InputError
from echodistill_core.models.fingerprint import (
    block_fingerprints,
    differing_blocks,
    sampled_fingerprint,
    unet_fingerprint,
)
from echodistill_core.models.load import load_family
from echodistill_core.training.identity import differences, family_identity
from echodistill_core.training.run import open_run


def with_change(tensor, seed=0):
    """What a LoRA of rank 1 makes of a matrix, in the order of its weights' own size; a shift of anything else."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.ndim < 2:
        return tensor + 0.01
    flat = tensor.flatten(1)
    up, down = torch.randn(len(flat), 1, generator=generator), torch.randn(1, flat.shape[1], generator=generator)
    return tensor + (0.01 * up @ down).view_as(tensor)


@pytest.mark.parametrize("network", ["student", "teacher", "vae"])
def test_a_change_of_any_layer_is_another_fingerprint(tiny_family, network):
    tensors = tiny_family().loaded[network]
    seen = {sampled_fingerprint(tensors)}
    for name, tensor in tensors.items():
        seen.add(sampled_fingerprint({**tensors, name: with_change(tensor)}))
    assert len(seen) == 1 + len(tensors)


def test_the_same_weights_in_another_order_precision_and_memory_layout_are_the_same(tiny_family):
    tensors = {n: t.half() for n, t in tiny_family().loaded["student"].items()}
    others = {n: t.float() for n, t in reversed(tensors.items())}
    others = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in others.items()}
    assert sampled_fingerprint(others) == sampled_fingerprint(tensors)
    assert block_fingerprints(others) == block_fingerprints(tensors)


def test_names_and_shapes_count():
    weight = torch.arange(12.0)
    prints = {
        sampled_fingerprint({"a": weight}),
        sampled_fingerprint({"b": weight}),
        sampled_fingerprint({"a": weight.view(3, 4)}),
        sampled_fingerprint({"a": weight, "b": weight}),
    }
    assert len(prints) == 4


def test_the_differing_blocks_are_those_that_were_changed(tiny_family):
    tensors = tiny_family().loaded["student"]
    before = block_fingerprints(tensors)
    named = {"conv_in.weight": "conv_in", "mid_block.resnets.0.conv1.weight": "mid_block"}
    named["up_blocks.1.attentions.0.proj_in.weight"] = "up_blocks.1"
    for name, block in named.items():
        after = block_fingerprints({**tensors, name: with_change(tensors[name])})
        assert differing_blocks(before, after) == [block]
    assert set(before) >= {"conv_in", "conv_out", "down_blocks.0", "mid_block", "time_embedding", "up_blocks.2"}


def merged(tiny_family, network, name):
    """A family one of whose weights was changed outside of training."""
    family = tiny_family()
    family.networks()[network].state_dict()[name].copy_(with_change(family.loaded[network][name]))
    return family


OTHER_LAYERS = [
    ("vae", "decoder.conv_out.weight"),
    ("vae", "encoder.conv_in.bias"),
    ("student", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ("teacher", "up_blocks.0.resnets.0.conv1.weight"),
]


@pytest.mark.parametrize(("network", "name"), OTHER_LAYERS)
def test_a_run_of_other_weights_is_another_run(tmp_path, tiny_family, train_tiny, network, name):
    """Found finished, the earlier run would be returned for a VAE or a LoRA that it was not trained with."""
    train_tiny(tmp_path / "run", iterations=1)
    other = merged(tiny_family, network, name)
    key = "vae" if network == "vae" else f"{network}_weights"
    ours, theirs = family_identity(tiny_family()), family_identity(other)
    assert {n for n in ours if ours[n] != theirs[n]} == {key}
    with pytest.raises(InputError, match=f"holds another run: {key} is "):
        train_tiny(tmp_path / "run", other, iterations=1)


def test_a_run_from_before_these_fingerprints_goes_on(tmp_path, train_tiny, tiny_family):
    folder = tmp_path / "run"
    train_tiny(folder, iterations=1)
    record = json.loads((folder / "run.json").read_text())
    for key in ("student_weights", "teacher_weights", "vae", "configuration"):
        del record["identity"][key]
    from echodistill_core.training.identity import fingerprint_of

    record["fingerprint"] = fingerprint_of(record["identity"])
    (folder / "run.json").write_text(json.dumps(record))
    run = train_tiny(folder, iterations=1)
    assert run.record["identity"] == record["identity"]
    run.check_family(tiny_family())
    assert "vae" not in differences(open_run(folder).record["identity"], run.record["identity"])


def test_an_adapter_for_a_model_whose_other_layers_differ_says_so(tmp_path, train_tiny, tiny_family):
    run = train_tiny(tmp_path / "run", iterations=1)
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    assert adapter.base_blocks == block_fingerprints(tiny_family().loaded["student"])
    other = merged(tiny_family, "student", "mid_block.resnets.0.conv1.weight")
    assert unet_fingerprint(other.loaded["student"]) == other.student.fingerprint
    with (
        pytest.warns(UserWarning, match=r"1 of \d+ blocks \(mid_block\)"),
        personalised(other, [adapter]),
    ):
        pass
    assert block_mismatch(adapter, tiny_family().blocks("student")) == ""


def test_an_adapter_without_fingerprints_gives_no_warning(tmp_path, train_tiny, tiny_family):
    run = train_tiny(tmp_path / "run", iterations=1)
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    for said in (None, "no JSON", "[1]"):
        adapter.metadata["base_blocks"] = said
        if said is None:
            del adapter.metadata["base_blocks"]
        assert block_mismatch(adapter, {"conv_in": "0"}) == ""


def test_a_run_does_not_go_on_with_other_backbones(tmp_path, train_tiny, monkeypatch):
    """Their features determine the result; another file of the same shapes would change it without a message."""
    from echodistill_core.training import session
    from echodistill_core.training.events import StepDone

    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", iterations=2, listen=stop_at(StepDone, StopError, step=1))
    load = session.load_backbones

    def others(*arguments):
        backbones = load(*arguments)
        weight = next(iter(backbones["dino"].encoder.parameters()))
        weight.data = with_change(weight.data)
        return backbones

    monkeypatch.setattr(session, "load_backbones", others)
    with pytest.raises(InputError, match=r"other files of the backbones dino"):
        train_tiny(tmp_path / "run", iterations=2)
    monkeypatch.undo()
    assert train_tiny(tmp_path / "run", iterations=2).is_finished("distil")


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.vae.register_to_config(scaling_factor=0.5),
        lambda f: f.student.unet.register_to_config(norm_eps=1e-3),
        lambda f: f.student.unet.register_to_config(act_fn="gelu"),
        lambda f: setattr(f.text.model.config, "hidden_act", "quick_gelu"),
        lambda f: setattr(f.teacher, "schedule", NoiseSchedule(f.teacher.schedule.alphas_cumprod**1.1, "v_prediction")),
    ],
)
def test_equal_weights_computed_with_in_another_way_are_another_run(tiny_family, change):
    other = tiny_family()
    change(other)
    ours, theirs = family_identity(tiny_family()), family_identity(other)
    assert {n for n in ours if ours[n] != theirs[n]} == {"configuration"}


def test_an_adapter_that_is_used_on_another_base_as_allowed_is_noted(tmp_path, train_tiny, tiny_family):
    run = train_tiny(tmp_path / "run", iterations=1)
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    other = tiny_family()
    other.student.fingerprint = "0" * 16
    name = next(n for n, _ in other.student.unet.named_parameters() if n.endswith("attn2.to_k.weight"))

    def adapted():
        with personalised(other, [adapter], any_base=True) as model:
            return model.denoiser.unet.get_parameter(name).detach().clone()

    with pytest.warns(UserWarning, match=r"another base model .* allowed"):
        weight = adapted()
    assert not torch.equal(weight, other.loaded["student"][name])


def test_one_model_as_a_folder_and_as_a_single_file_is_one_model(tmp_path):
    """Their configurations are written differently; a run that started with one resumes with the other."""
    parts = checkpoint_parts()
    sources = (write_folder(tmp_path / "folder", parts), single_file(parts))
    as_folder, as_file = (family_identity(load_family(source, source)) for source in sources)
    assert as_folder == as_file
