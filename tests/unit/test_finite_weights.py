"""Weights and pictures that hold NaN or infinity: found at load, named, and never written as a picture."""

import pytest
import torch
from checkpoints import TEXT, UNET, VAE, refused, single_file
from PIL import Image

from echodistill_core.cli import main
from echodistill_core.errors import DivergedError
from echodistill_core.models.finite import is_finite
from echodistill_core.models.load import load_family
from echodistill_core.reporting import contact_sheet, save_picture, to_pictures
from echodistill_core.sampling import clamp_finite
from echodistill_core.tensorfile import write_tensors
from echodistill_core.training.samples import one_step_images

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


# One tensor


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_bad_value_is_found_wherever_it_stands_and_whatever_its_sign(dtype):
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    for length in (1, 7, 64, 1000):
        for place in {0, length // 2, length - 1}:
            for value in bad:
                tensor = torch.linspace(-3, 3, length).to(dtype)
                assert is_finite(tensor)
                tensor[place] = torch.tensor(value).to(dtype)
                assert not is_finite(tensor), (length, place, value)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_largest_numbers_of_a_type_are_numbers_though_their_sum_is_none(dtype):
    info = torch.finfo(dtype)
    tensor = torch.full((10_000,), info.max, dtype=torch.float64).to(dtype)
    assert is_finite(tensor)
    assert is_finite(torch.cat([tensor.double(), -tensor.double()]).to(dtype).reshape(100, 200).t())


def test_every_8_bit_code_is_judged_as_its_float32_value_is():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        for code in range(256):
            tensor = torch.tensor([code], dtype=torch.uint8).view(dtype)
            assert is_finite(tensor) == bool(torch.isfinite(tensor.float()).all()), (dtype, code)


def test_strided_expanded_empty_and_integer_tensors():
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.full((3,), torch.iinfo(torch.int64).max))
    assert is_finite(torch.ones(1).expand(5, 5))
    wide = torch.ones(4, 6)
    wide[:, 1] = float("nan")
    assert is_finite(wide[:, ::2])
    assert not is_finite(wide[:, 1::2])


# At load


@pytest.mark.parametrize(
    "name",
    [
        VAE + "decoder.conv_out.bias",
        VAE + "encoder.mid.attn_1.q.weight",
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        TEXT + "transformer.resblocks.1.attn.in_proj_weight",
        TEXT + "token_embedding.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_files_bad_tensor_is_named_as_the_file_names_it(tmp_path, parts, name, value):
    tensors = single_file(parts)
    changed = tensors[name].clone()
    changed.view(-1)[-1] = value
    path = tmp_path / "bad.safetensors"
    write_tensors(path, {**tensors, name: changed}, {})
    message = refused(path)
    assert str(path) in message
    assert name in message
    assert "NaN or infinity (1 of " in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_role_and_every_type_is_looked_at(parts, dtype):
    bad = {n: t.to(dtype) for n, t in parts["unet"].items()}
    bad["conv_out.weight"] = bad["conv_out.weight"].clone()
    bad["conv_out.weight"].view(torch.uint8).view(-1)[-2:] = 255  # NaN in each of these types
    spoilt = {**parts, "unet": bad}
    message = refused(spoilt)
    assert message.startswith("UNet of student: 1 tensor (conv_out.weight)")
    assert refused(parts, teacher=spoilt).startswith("UNet of teacher: 1 tensor (conv_out.weight)")
    load_family(parts, spoilt, with_teacher=False)  # what is not used may be anything


def test_several_bad_tensors_are_counted(parts):
    vae = {
        n: torch.full_like(t, float("nan")) if n.startswith("decoder.conv_out") else t for n, t in parts["vae"].items()
    }
    assert "2 tensors (decoder.conv_out.weight, decoder.conv_out.bias)" in refused({**parts, "vae": vae})


def test_a_lora_with_nan_is_named(tmp_path, parts):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "lora.safetensors"
    up = torch.full((32, 4), float("nan"))
    write_tensors(path, {f"{key}.lora_down.weight": torch.ones(4, 32), f"{key}.lora_up.weight": up}, {})
    message = refused(parts, student_lora=path)
    assert str(path) in message
    assert f"{key}.lora_up.weight" in message


def test_finite_weights_are_the_very_tensors_given(parts):
    family = load_family(parts)
    for name, tensor in family.student.unet.state_dict().items():
        assert tensor.data_ptr() == parts["unet"][name].data_ptr()


# Pictures


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_picture_that_is_not_finite_becomes_no_file(tmp_path, value):
    images = torch.zeros(2, 3, 8, 8)
    images[1, 2, 3, 4] = value
    for make in (to_pictures, contact_sheet, clamp_finite):
        with pytest.raises(DivergedError, match="NaN or infinity"):
            make(images)


def test_a_picture_of_one_colour_is_a_picture(tmp_path):
    for value in (-1.0, 0.0, 1.0, 7.0):
        (picture,) = to_pictures(torch.full((1, 3, 8, 8), value))
        save_picture(tmp_path / "plain.png", picture)
        pixel = round((max(-1, min(1, value)) + 1) * 127.5)
        assert Image.open(tmp_path / "plain.png").getcolors() == [(64, (pixel,) * 3)]


def test_the_command_line_ends_with_status_1_and_writes_nothing(tmp_path, parts, capsys):
    """Finite weights, so large that the picture overflows."""
    vae = {n: t * 3e38 if n == "decoder.conv_out.weight" else t for n, t in parts["vae"].items()}
    vae["decoder.conv_out.weight"] = vae["decoder.conv_out.weight"].clamp(-3e38, 3e38)
    path, out = tmp_path / "huge.safetensors", tmp_path / "picture.png"
    write_tensors(path, single_file({**parts, "vae": vae}), {})
    command = ["sample", "--family", "tiny", "--student", str(path), "--prompt", "a dog", "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 1
    assert not out.exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "NaN or infinity" in said
    assert "precision fp32" in said


def test_previews_and_pools_of_a_run_are_pictures_too(tiny_state):
    state = tiny_state()
    assert one_step_images(state, ["a dog"], 0, 64).isfinite().all()
    state.family.vae.decoder.conv_out.bias.data[1] = float("inf")
    with pytest.raises(DivergedError, match="NaN or infinity"):
        one_step_images(state, ["a dog"], 0, 64)
