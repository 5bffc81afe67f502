"""Loading tensors in memory, and merging a LoRA."""

import copy
import hashlib

import pytest
import torch
from published_models import (
    TO_K,
    assert_holds,
    single_file,
    write_lora,
)
from safetensors.torch import load_file, save_file

from echodistill_core.errors import InputError
from echodistill_core.models.architectures import TINY
from echodistill_core.models.load import load_family

# Tensors that a caller hands over


def given(parts, kind):
    original = single_file(parts, TINY)
    if kind == "flat":
        return original

    def under(prefix):
        return {n.removeprefix(prefix): t for n, t in original.items() if n.startswith(prefix)}

    if kind == "original names":
        unet, vae = under("model.diffusion_model."), under("first_stage_model.")
        return {"unet": unet, "vae": vae, "text_encoder": under("cond_stage_model.model.")}
    if kind == "longer text encoder":
        text = {"text_model." + n.removeprefix("text_model."): t for n, t in parts["text_encoder"].items()}
        for name in [n for n in text if ".layers.1." in n]:
            text[name.replace(".layers.1.", ".layers.2.")] = torch.ones_like(text[name])
        text["text_projection.weight"] = torch.eye(32)
        text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return {**parts, "text_encoder": text}
    assert kind == "diffusers names"
    return parts


KINDS = ["flat", "diffusers names", "original names", "longer text encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_given_tensors_load(parts, kind):
    assert_holds(load_family(given(parts, kind)), parts)


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_given_tensors_are_not_modified(tmp_path, parts, kind, with_lora):
    source = given(copy.deepcopy(parts), kind)
    groups = [source] if kind == "flat" else list(source.values())
    before = [{n: t.clone() for n, t in group.items()} for group in groups]
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0}) if with_lora else None
    family = load_family(source, student_lora=lora)
    family.to("cpu", torch.float16)
    for group, original in zip(groups, before, strict=True):
        assert group.keys() == original.keys()
        for name, tensor in original.items():
            assert group[name].dtype == tensor.dtype
            assert torch.equal(group[name], tensor), name


def test_given_parameters_keep_their_own_gradients_on(parts):
    live = {n: torch.nn.Parameter(t.clone()) for n, t in parts["unet"].items()}
    family = load_family({**parts, "unet": live})
    assert all(p.requires_grad for p in live.values())
    assert not any(p.requires_grad for p in family.student.unet.parameters())


def test_files_are_not_modified(tmp_path, file, folder):
    lora = write_lora(tmp_path / "lora.safetensors", {TO_K: 1.0})
    paths = [file, lora, *sorted(p for p in folder.rglob("*") if p.is_file())]
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
    for source in (file, folder):
        family = load_family(source, student_lora=lora)
        for parameter in family.student.unet.parameters():  # files may be mapped into memory
            parameter.data += 1
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] == digests


def test_a_lora_is_merged_with_its_alpha_over_rank(tmp_path, parts):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    out = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"
    alphas = {TO_K: 2.0, q: 4.0, out: 8.0}
    path = write_lora(tmp_path / "lora.safetensors", alphas)
    given_lora = load_file(path)
    family = load_family(parts, parts, student_lora=path)
    merged = family.student.unet.state_dict()
    assert merged.keys() == parts["unet"].keys()
    for name, weight in parts["unet"].items():
        expected = weight
        if name in alphas:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            up, down = given_lora[f"{key}.lora_up.weight"], given_lora[f"{key}.lora_down.weight"]
            expected = weight + alphas[name] / 4 * up @ down
            assert not torch.allclose(expected, weight, atol=0.1)
        assert torch.allclose(merged[name], expected, atol=1e-5, rtol=1e-5), name
    assert all(torch.equal(t, parts["unet"][n]) for n, t in family.teacher.unet.state_dict().items())
    assert family.student.fingerprint != family.teacher.fingerprint
    assert not any(p.requires_grad for p in family.student.unet.parameters())


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 32)}, "does not fit the student"),
        ({"something": (3,)}, "nothing for the UNet"),
        (
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 77),
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (32, 4),
            },
            "size mismatch",
        ),
    ],
    ids=["text encoder only", "no LoRA", "other width"],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, parts, tensors, expected):
    path = tmp_path / "lora.safetensors"
    save_file({n: torch.zeros(shape) for n, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=expected) as refusal:
        load_family(parts, student_lora=path)
    assert str(path) in str(refusal.value)
