"""8-bit floats with ComfyUI's scales are multiplied out; every other form of quantisation is refused by name."""

import json

import pytest
import torch
from checkpoints import TEXT, UNET, checkpoint_parts, refused, single_file, write_folder
from tensor_files import assert_same

from echodistill_core.models.checkpoint import read_checkpoint
from echodistill_core.models.load import load_family
from echodistill_core.tensorfile import write_tensors

FP8 = torch.float8_e4m3fn
TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"


def scaled(parts, dtype=FP8):
    """(the single file with its UNet's matrices as 8-bit floats, their scales by layer, what they stand for)."""
    tensors, scales, expected = single_file(parts), {}, {}
    for name, tensor in list(tensors.items()):
        if name.startswith(UNET) and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / torch.finfo(dtype).max
            tensors[name] = (tensor / scale).to(dtype)
            scales[name.removesuffix(".weight")] = scale
            expected[name] = tensors[name].float() * float(scale)
    assert len(scales) > 20
    return tensors, scales, {**tensors, **expected}


def as_comfy(kind, tensors, scales):
    """The file's tensors and metadata as some version of ComfyUI writes them."""
    metadata = {}
    if kind.startswith("scale_weight"):
        tensors = {**tensors, **{f"{n}.scale_weight": s for n, s in scales.items()}}
        tensors[UNET + "scaled_fp8"] = torch.zeros(2 if "precise" in kind else 0, dtype=FP8)
        tensors |= {f"{n}.scale_input": torch.tensor(1.0) for n in scales}
    else:
        tensors = {**tensors, **{f"{n}.weight_scale": s.reshape(1) for n, s in scales.items()}}
        tensors |= {f"{n}.input_scale": torch.tensor(0.3) for n in scales}
        form = {"format": "float8_e4m3fn"}
        if "metadata" in kind:
            metadata["_quantization_metadata"] = json.dumps({"layers": dict.fromkeys(scales, form)})
        else:
            mark = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
            tensors |= {f"{n}.comfy_quant": mark for n in scales}
    return tensors, metadata


KINDS = ["scale_weight", "scale_weight, precise", "weight_scale", "weight_scale in metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_multiplied_into_their_weights(tmp_path, parts, kind):
    tensors, scales, expected = scaled(parts)
    write_tensors(tmp_path / "fp8.safetensors", *as_comfy(kind, tensors, scales))
    found, true = load_family(tmp_path / "fp8.safetensors"), load_family(expected)
    assert_same(found.student.unet.state_dict(), true.student.unet.state_dict())
    assert found.student.fingerprint == true.student.fingerprint
    assert found.warnings == []
    for name, tensor in parts["unet"].items():  # 3 bits of mantissa: within 1/16 of each value, or of the least step
        error = (found.student.unet.state_dict()[name] - tensor).abs()
        assert (error <= tensor.abs() / 16 + tensor.abs().max() / 448 / 512).all(), name


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_products_have_the_precision_of_the_other_weights(parts, precision):
    tensors, scales, expected = scaled(parts)
    tensors = {n: t if t.dtype == FP8 else t.to(precision) for n, t in tensors.items()}
    read = read_checkpoint(as_comfy("scale_weight", tensors, scales)[0])
    assert {t.dtype for t in read.unet.values()} == {precision}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(read.unet[name], expected[f"{UNET}{TO_K}.weight"].to(precision))


def test_8_bit_floats_without_scales_stay_as_they_are(tmp_path, parts):
    tensors = {n: t.to(FP8) if n.startswith(UNET) else t for n, t in single_file(parts).items()}
    write_tensors(tmp_path / "plain.safetensors", {**tensors, UNET + "scaled_fp8": torch.zeros(0, dtype=FP8)}, {})
    state = load_family(tmp_path / "plain.safetensors").student.unet.state_dict()
    assert all(t.dtype == FP8 and torch.equal(t.float(), parts["unet"][n].to(FP8).float()) for n, t in state.items())


def test_given_parts_folders_and_text_encoders_are_multiplied_too(tmp_path, parts):
    layer = "encoder.layers.0.mlp.fc1"
    weight = parts["text_encoder"][f"{layer}.weight"]
    text = {**parts["text_encoder"], f"{layer}.weight": weight.to(FP8), f"{layer}.scale_weight": torch.tensor(0.5)}
    expected = weight.to(FP8).float() * 0.5
    given = {**parts, "text_encoder": text}
    assert torch.equal(load_family(given).text.model.state_dict()[f"{layer}.weight"], expected)
    folder = write_folder(tmp_path / "folder", given)
    assert torch.equal(load_family(folder).text.model.state_dict()[f"{layer}.weight"], expected)
    tensors = single_file(parts)
    name = f"{TEXT}transformer.resblocks.0.mlp.c_fc"
    tensors |= {f"{name}.weight": weight.to(FP8), f"{name}.scale_weight": torch.tensor(0.5)}
    assert torch.equal(load_family(tensors).text.model.state_dict()[f"{layer}.weight"], expected)


FOREIGN = {
    "bitsandbytes": [
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
        ".SCB",
        ".weight_format",
    ],
    "GPTQ or AWQ": [".qweight", ".qzeros", ".g_idx", ".scales"],
    "ComfyUI": [".weight_scale_2", ".weight_s_rel", ".pre_quant_scale"],
    "compressed-tensors": [".weight_scale_inv", ".weight_packed"],
    "quanto or torchao": [".weight._data", ".weight._scale", "._weight_qdata"],
}


@pytest.mark.parametrize(("method", "suffix"), [(m, s) for m, suffixes in FOREIGN.items() for s in suffixes])
def test_other_forms_are_refused_by_name(parts, method, suffix):
    name = f"{UNET}{TO_K}{suffix}"
    message = refused({**single_file(parts), name: torch.zeros(4)})
    assert name in message
    assert f"quantised by {method}" in message


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", None])
def test_comfyuis_other_formats_are_refused_by_name(tmp_path, parts, form):
    mark = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    tensors = {**single_file(parts), f"{UNET}{TO_K}.weight_scale": torch.ones(())}
    assert repr(form) in refused({**tensors, f"{UNET}{TO_K}.comfy_quant": mark})
    metadata = {"_quantization_metadata": json.dumps({"layers": {TO_K: {"format": form}}})}
    write_tensors(tmp_path / "other.safetensors", tensors, metadata)
    assert repr(form) in refused(tmp_path / "other.safetensors")


@pytest.mark.parametrize("metadata", ["{", "[]", "[" * 100_000, '{"layers": 3}'])
def test_unreadable_metadata_of_a_quantisation_is_refused(tmp_path, parts, metadata):
    write_tensors(tmp_path / "odd.safetensors", single_file(parts), {"_quantization_metadata": metadata})
    assert "_quantization_metadata is quantised as None" in refused(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("scale", [torch.ones(2), torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(float("nan"))])
def test_a_scale_that_is_not_one_positive_number_is_refused(parts, scale):
    name = f"{UNET}{TO_K}.scale_weight"
    assert f"the scale {name} has shape" in refused({**single_file(parts), name: scale})


def test_a_scale_without_its_weight_and_two_scales_are_refused(parts):
    tensors = {n: t for n, t in single_file(parts).items() if n != f"{UNET}{TO_K}.weight"}
    message = refused({**tensors, f"{UNET}{TO_K}.scale_weight": torch.ones(())})
    assert f"{TO_K}.weight, which is missing" in message
    two = {f"{UNET}{TO_K}.scale_weight": torch.tensor(2.0), f"{UNET}{TO_K}.weight_scale": torch.tensor(3.0)}
    assert "two scales that differ" in refused({**single_file(parts), **two})


def test_integers_are_no_weights(parts):
    unet = {**parts["unet"], "conv_out.weight": torch.zeros_like(parts["unet"]["conv_out.weight"], dtype=torch.int8)}
    assert "tensor conv_out.weight has the type torch.int8" in refused({**parts, "unet": unet})


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_folder_that_states_quantised_weights_is_refused(tmp_path, parts, part):
    folder = write_folder(
        tmp_path / "folder", parts, **{part: {"quantization_config": {"quant_method": "bitsandbytes"}}}
    )
    message = refused(folder)
    assert str(folder / part / "config.json") in message
    assert "bitsandbytes" in message


@pytest.mark.parametrize("leaf", ["scale", "weight.scale", "dequant_scale", "amax", "weight_quantizer._scale"])
def test_a_scale_under_another_name_beside_an_8_bit_weight_is_refused(leaf):
    """Named in a warning only, the weights would be read without it."""
    tensors = single_file(checkpoint_parts())
    name = next(n for n in tensors if n.endswith("attn2.to_k.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name.removesuffix('.weight')}.{leaf}"] = torch.tensor(0.01)
    assert "scales the 8-bit weight" in refused(tensors)
