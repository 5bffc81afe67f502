"""Which files of a network's folder are its weights."""

import json

import pytest
import torch
from checkpoints import STEMS, checkpoint_parts, refused, write_folder
from tensor_files import assert_same

from echodistill_core.errors import InputError
from echodistill_core.models.load import load_family
from echodistill_core.models.weightfiles import weights_in
from echodistill_core.tensorfile import write_tensors

A, B = {"a": torch.tensor([1.0])}, {"b": torch.tensor([2.0])}
OTHER = {"a": torch.tensor([9.0])}


def write_shards(folder, stem, index, shards=(A, B)):
    names = {}
    for i, tensors in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, tensors, {})
        names |= dict.fromkeys(tensors, file)
    (folder / index).write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", ["bf16", "non_ema", "fp16", "fp8.e4m3"])
def test_the_only_variant_is_read(tmp_path, stem, variant):
    write_tensors(tmp_path / f"{stem}.{variant}.safetensors", A, {})
    assert_same(weights_in(tmp_path), A)


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model", "model.safetensors.index.json"),
        ("model.fp16", "model.fp16.safetensors.index.json"),
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("model.bf16", "model.bf16.safetensors.index.json"),
        ("diffusion_pytorch_model.bf16", "diffusion_pytorch_model.safetensors.index.bf16.json"),
        ("diffusion_pytorch_model.non_ema", "diffusion_pytorch_model.non_ema.safetensors.index.json"),
    ],
)
def test_shards_are_joined_whatever_the_form_of_their_index(tmp_path, stem, index):
    write_shards(tmp_path, stem, index)
    assert_same(weights_in(tmp_path), {**A, **B})


def test_the_usual_files_come_before_other_variants(tmp_path):
    for variant in (".bf16", ".non_ema", ".fp16", ""):
        write_tensors(tmp_path / f"model{variant}.safetensors", A, {})
        if variant != ".bf16" and variant != ".non_ema":
            assert_same(weights_in(tmp_path), A)
        write_tensors(tmp_path / f"model{variant}.safetensors", OTHER, {})


def test_several_variants_are_listed(tmp_path):
    write_tensors(tmp_path / "model.bf16.safetensors", A, {})
    write_shards(tmp_path, "model.non_ema", "model.non_ema.safetensors.index.json")
    with pytest.raises(InputError, match=r"variants \(model\.bf16, model\.non_ema\)") as caught:
        weights_in(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, "model", "model.safetensors.index.json", (A, B, {"c": torch.ones(1)}))
    for gone in (1, 3):
        (tmp_path / f"model-{gone:05d}-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"3 shards .* 2 are missing") as caught:
        weights_in(tmp_path)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in str(caught.value)


def test_a_folder_of_something_else_says_what_is_there(tmp_path):
    write_tensors(tmp_path / "pytorch_lora_weights.safetensors", A, {})
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", A, {})
    with pytest.raises(InputError, match=r"no \.safetensors weights.*pytorch_lora_weights"):
        weights_in(tmp_path)


def test_a_checkpoint_of_bf16_files_alone_loads(tmp_path):
    parts = {name: {n: t.bfloat16() for n, t in tensors.items()} for name, tensors in checkpoint_parts().items()}
    folder = write_folder(tmp_path / "bf16", parts)
    for part, stem in STEMS.items():
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.bf16.safetensors")
    family = load_family(folder)
    assert_same(family.student.unet.state_dict(), parts["unet"])
    assert_same(family.vae.state_dict(), parts["vae"])
    (folder / "unet" / "diffusion_pytorch_model.bf16.safetensors").unlink()
    assert f"{folder / 'unet'} holds no .safetensors weights" in refused(folder)
