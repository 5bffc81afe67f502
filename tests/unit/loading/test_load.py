"""Loading folders and single files, bit-equal and against diffusers and transformers."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from published_models import (
    PROMPT,
    SMALL_SD1,
    TO_K,
    assert_holds,
    networks,
    noise,
    parts_of,
    save_folder,
    single_file,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from echodistill_core.models.architectures import TINY
from echodistill_core.models.checkpoint import read_checkpoint
from echodistill_core.models.conditioning import TextConditioning
from echodistill_core.models.load import load_family
from echodistill_core.models.tiny import tiny_checkpoint

# Both layouts


def test_both_layouts_load_bit_equal_to_what_was_written(folder, file, parts):
    for source in (folder, file, str(file)):
        assert_holds(load_family(source), parts)


def test_outputs_equal_those_of_models_loaded_by_diffusers_and_transformers(folder, file):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = torch.tensor([[49406, 1125, 539, 320, 1929, 49407, *[0] * 71]])
    z, t, x = noise(1, 1, 4, 8, 8), torch.tensor([999]), noise(2, 1, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        features = text(ids).last_hidden_state
        for family in (load_family(folder), load_family(file)):
            assert torch.equal(family.text([PROMPT]), features)
            assert torch.equal(
                family.student.predict(z, t, TextConditioning(features)),
                unet(z, t, encoder_hidden_states=features).sample,
            )
            assert torch.equal(family.encode(x), vae.encode(x).latent_dist.mode() * 0.18215)
            assert torch.allclose(family.decode(z), vae.decode(z / 0.18215).sample, atol=1e-6)


def test_latents_are_drawn_from_the_posterior(folder):
    family = load_family(folder)
    x = noise(2, 2, 3, 64, 64).clamp(-1, 1)
    unit = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    drawn = family.scaled(family.posterior(x), unit)
    posterior = AutoencoderKL.from_pretrained(folder / "vae").eval().encode(x).latent_dist
    assert torch.allclose(drawn, 0.18215 * posterior.sample(torch.Generator().manual_seed(4)), atol=1e-6)


def test_a_loaded_family_is_frozen_and_in_evaluation(folder):
    family = load_family(folder, tiny_checkpoint("teacher"))
    for module in family.networks().values():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("variant", ["fp16", None])
def test_sharded_folders_load(tmp_path, models, parts, variant):
    save_folder(tmp_path, models, variant=variant, max_shard_size="200KB")
    for part in ("unet", "text_encoder", "vae"):
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
    assert_holds(load_family(tmp_path), parts)


def test_a_half_precision_variant_loads_in_its_own_precision(tmp_path, models, parts):
    halves = SimpleNamespace(**{name: copy.deepcopy(module).half() for name, module in vars(models).items()})
    save_folder(tmp_path, halves, variant="fp16")
    assert not list(tmp_path.rglob("*model.safetensors"))
    assert_holds(load_family(tmp_path), {p: {n: t.half() for n, t in ts.items()} for p, ts in parts.items()})


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "1x1 convolution"])
def test_a_vae_folder_with_the_attention_names_of_2022(tmp_path, folder, models, parts, convolution):
    save_folder(tmp_path, models)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if ".attentions." in name and f".{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                if convolution and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None].contiguous()
        old[name] = tensor
    assert sum(".query." in n for n in old) == 4
    save_file(old, path)
    assert_holds(load_family(tmp_path), parts)
    if not convolution:
        theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()  # diffusers renames these itself
        assert all(torch.equal(tensor, theirs[n]) for n, tensor in load_family(tmp_path).vae.state_dict().items())


def test_text_folders_of_transformers_4_load(tmp_path, models, parts):
    save_folder(tmp_path, models)
    path = tmp_path / "text_encoder" / "model.safetensors"
    old = {"text_model." + n.removeprefix("text_model."): t for n, t in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path)
    assert_holds(load_family(tmp_path), parts)


# Single files


def test_a_single_file_of_sd1(tmp_path):
    models = networks(SMALL_SD1, 2)
    parts = parts_of(models)
    tensors = {n: t for n, t in single_file(parts, SMALL_SD1).items() if not n.startswith("cond_stage_model.")}
    for name, tensor in parts["text_encoder"].items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "sd1.safetensors")
    family = load_family(tmp_path / "sd1.safetensors", architecture=SMALL_SD1)
    assert_holds(family, parts)
    ids = torch.tensor([[49406, 1125, 539, 320, 1929, 49407, *[49407] * 71]])
    assert torch.equal(family.text([PROMPT]), models.text_encoder(ids).last_hidden_state)


def test_open_clips_last_layer_and_other_extras_are_ignored(file):
    read = read_checkpoint(file)
    layers = {n.split(".")[2] for n in read.text_encoder if n.startswith("encoder.layers.")}
    assert layers == {"0", "1"}
    assert len(load_file(file)) > len(read.unet) + len(read.vae) + len(read.text_encoder) - 8


def test_the_text_encoder_under_stabilitys_later_names(parts, tmp_path):
    renamed = {
        n.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t
        for n, t in single_file(parts, TINY).items()
    }
    save_file(renamed, tmp_path / "sd_turbo.safetensors")
    assert_holds(load_family(tmp_path / "sd_turbo.safetensors"), parts)


def test_fingerprints_are_of_the_model_not_of_its_precision_or_layout(tmp_path, folder, file, parts):
    save_file({n: t.half() for n, t in load_file(file).items()}, tmp_path / "half.safetensors")
    whole, half_family = load_family(file), load_family(tmp_path / "half.safetensors")
    assert half_family.student.unet.dtype == torch.float16
    for family in (half_family, load_family(folder)):
        assert family.student.fingerprint == whole.student.fingerprint
        assert family.text_fingerprint == whole.text_fingerprint
    assert re.fullmatch("[0-9a-f]{16}", whole.student.fingerprint)


def test_fingerprints_tell_other_weights(parts):
    whole = load_family(parts)
    changed = {**parts, "unet": {**parts["unet"], TO_K: parts["unet"][TO_K] * 1.01}}
    other = load_family(changed)
    assert other.student.fingerprint != whole.student.fingerprint
    assert other.text_fingerprint == whole.text_fingerprint
    name = "final_layer_norm.bias"
    changed = {**parts, "text_encoder": {**parts["text_encoder"], name: parts["text_encoder"][name] + 0.01}}
    other = load_family(changed)
    assert other.student.fingerprint == whole.student.fingerprint
    assert other.text_fingerprint != whole.text_fingerprint
