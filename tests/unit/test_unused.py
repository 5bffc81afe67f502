"""Tensors that nothing reads are named; harmless ones are not; one tensor under two names has one value."""

import pytest
import torch
from checkpoints import TEXT, UNET, VAE, checkpoint_parts, refused, single_file, write_folder
from tensor_files import assert_same

from echodistill_core.errors import InputError
from echodistill_core.models.load import load_family
from echodistill_core.tensorfile import write_tensors

BLOCK = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
ADAPTER = {f"{UNET}{BLOCK}.lora_{part}.default.weight": torch.ones(4, 32) for part in "AB"}
HARMLESS = [
    "model_ema.decay",
    "model_ema.num_updates",
    "model_ema.diffusion_modelinput_blocks00weight",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "logvar",
    "denoiser.sigmas",
    "global_step",
    "lr",
    f"{TEXT}text_projection",
    f"{TEXT}logit_scale",
    f"{TEXT}attn_mask",
    f"{TEXT}transformer.resblocks.2.attn.in_proj_weight",
    f"{TEXT}visual.conv1.weight",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    f"{VAE}loss.discriminator.main.0.weight",
    f"{VAE}model_ema.decay",
]


@pytest.fixture(scope="module")
def tensors(parts):
    return single_file(parts)


def test_an_adapter_beside_the_weights_of_a_single_file_is_named(tmp_path, tensors):
    path = tmp_path / "adapted.safetensors"
    write_tensors(path, {**tensors, **ADAPTER}, {})
    (warning,) = load_family(path).warnings
    assert f"{path}: 2 tensors are not read" in warning
    assert f"{UNET}{BLOCK}.lora_A.default.weight" in warning


def test_many_are_counted_and_the_first_named(tensors):
    added = {f"{UNET}added.{i}\n" + "x" * 1000: torch.ones(1) for i in range(50)}
    (warning,) = load_family({**tensors, **added}).warnings
    assert "50 tensors" in warning
    assert "added.0\\nxxx" in warning
    assert "added.7" not in warning
    assert len(warning) < 900
    assert "\n" not in warning


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}input_blocks.30.0.in_layers.0.weight",
        f"{VAE}decoder.up.9.block.0.norm1.weight",
        f"{VAE}quant_conv.lora_A.weight",
        f"{TEXT}transformer.resblocks.1.attn.lora_B.weight",
        f"{TEXT}transformer.resblocks.0.added.weight",
        "control_model.input_blocks.0.0.weight",
        "something",
    ],
)
def test_what_could_matter_is_named_in_every_network(tensors, name):
    (warning,) = load_family({**tensors, name: torch.ones(2)}).warnings
    assert f"1 tensors are not read by anything ({name})" in warning


def test_harmless_names_of_published_files_are_not_worth_a_word(tensors):
    family = load_family({**tensors, **{name: torch.ones(6, 2) for name in HARMLESS}})
    assert family.warnings == []


def test_both_roles_are_told_apart(tensors):
    adapted = {**tensors, **ADAPTER}
    assert ["student" in w for w in load_family(adapted, tensors).warnings] == [True]
    assert ["teacher" in w for w in load_family(tensors, adapted).warnings] == [True]


def test_given_parts_in_the_original_names(parts, tensors):
    def under(prefix):
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    given = {"unet": under(UNET), "vae": under(VAE), "text_encoder": under(TEXT)}
    assert load_family(given).warnings == []
    for part, called in (("unet", "UNet"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        (warning,) = load_family({**given, part: {**given[part], "x.lora_A.weight": torch.ones(1)}}).warnings
        assert warning.startswith(f"{called} of student: 1 tensors")
        assert "(x.lora_A.weight)" in warning


def test_folders(tmp_path, parts):
    """diffusers' own names leave no room beside them: UNet and VAE are refused, the text encoder is warned of."""
    text = {**parts["text_encoder"], "encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2)}
    (warning,) = load_family(write_folder(tmp_path / "text", {**parts, "text_encoder": text})).warnings
    assert "text encoder of " in warning
    text = {**parts["text_encoder"], "added.weight": torch.ones(2)}
    (warning,) = load_family(write_folder(tmp_path / "added", {**parts, "text_encoder": text})).warnings
    assert "added.weight" in warning
    for part in ("unet", "vae"):
        folder = write_folder(tmp_path / part, {**parts, part: {**parts[part], "x.lora_A.weight": torch.ones(2)}})
        assert "(the first is x.lora_A.weight)" in refused(folder)


def test_what_a_lora_holds_for_other_networks_is_named(tmp_path, parts):
    def lora(key, outputs, inputs):
        return {f"{key}.lora_down.weight": torch.ones(4, inputs), f"{key}.lora_up.weight": torch.ones(outputs, 4)}

    for_unet = lora("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 32, 32)
    for_text = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 64, 32)
    path = tmp_path / "lora.safetensors"
    write_tensors(path, for_unet, {})
    assert load_family(parts, student_lora=path).warnings == []
    write_tensors(path, {**for_unet, **for_text}, {})
    family = load_family(parts, student_lora=path)
    assert_same(family.text.model.state_dict(), parts["text_encoder"])
    (warning,) = family.warnings
    assert f"LoRA {path}: 2 tensors are not for the UNet" in warning
    assert "mlp.fc1" in warning


# One tensor under two names


def other_names(parts):
    """A second text encoder, under each prefix that single files use for it."""
    text = parts["text_encoder"]
    for root in ("cond_stage_model.transformer.text_model.", "conditioner.embedders.0.transformer.text_model."):
        yield {root + n: t for n, t in text.items()}
    yield {
        "conditioner.embedders.0.model." + n.removeprefix(TEXT): t
        for n, t in single_file(parts).items()
        if n.startswith(TEXT)
    }


def test_the_same_values_twice_are_one_tensor(parts, tensors):
    for second in other_names(parts):
        family = load_family({**tensors, **second})
        assert_same(family.text.model.state_dict(), parts["text_encoder"])
        assert family.warnings == []


def test_other_values_under_a_second_name_are_refused(parts, tensors):
    for second in other_names(parts):
        name = next(n for n in second if n.endswith(("final_layer_norm.bias", "ln_final.bias")))
        message = refused({**tensors, **second, name: second[name] + 1})
        assert name in message
        assert f"{TEXT}ln_final.bias" in message
        assert "twice with different values" in message


def test_a_vae_with_old_and_new_names_at_once(tmp_path, parts):
    new = "decoder.mid_block.attentions.0.to_q.weight"
    old = new.replace("to_q", "query")
    vae = {**parts["vae"], old: parts["vae"][new].clone()}
    assert_same(load_family({**parts, "vae": vae}).vae.state_dict(), parts["vae"])
    message = refused({**parts, "vae": {**vae, old: vae[new] + 1}})
    assert old in message
    assert new in message


@pytest.mark.parametrize("case", ["another block", "only one half", "a difference"])
def test_a_lora_part_without_a_place_in_the_unet_is_refused(tmp_path, case):
    """diffusers only logs it, and would merge the rest."""
    pytest.importorskip("peft")
    parts = checkpoint_parts()
    name = next(n for n in parts["unet"] if n.endswith("attn1.to_q.weight")).removesuffix(".weight")
    out, width = parts["unet"][f"{name}.weight"].shape
    pair = {".lora_A.weight": torch.ones(2, width), ".lora_B.weight": torch.ones(out, 2)}
    lora = {f"unet.{name}{leaf}": tensor for leaf, tensor in pair.items()}
    if case == "another block":
        lora |= {f"unet.down_blocks.9.attentions.0.to_q{leaf}": tensor.clone() for leaf, tensor in pair.items()}
    elif case == "only one half":
        lora[f"unet.{name.replace('to_q', 'to_k')}.lora_A.weight"] = torch.ones(2, width)
    else:
        lora["unet.conv_in.diff"] = torch.ones_like(parts["unet"]["conv_in.weight"])
    write_tensors(tmp_path / "lora.safetensors", lora, {})
    with pytest.raises(InputError, match=r"LoRA .*lora\.safetensors"):
        load_family(parts, student_lora=tmp_path / "lora.safetensors")
