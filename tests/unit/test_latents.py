"""VAEs that make other latents than the UNet reads, and configurations of which no network can be built."""

import json

import pytest
import torch
from checkpoints import VAE, refused, single_file, write_folder
from tensor_files import assert_same

from echodistill_core.models.load import load_family


@pytest.mark.parametrize(
    ("vae", "expected"),
    [
        ({"latent_channels": 16}, "has 16 latent channels, but the UNet reads 4"),
        ({"scaling_factor": None}, "scaling_factor is None"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("inf")}, "scaling_factor is inf"),
        ({"scaling_factor": "x" * 100_000}, "scaling_factor is 'xxx"),
        ({"shift_factor": 0.1159}, "shift_factor is 0.1159"),
        ({"latents_mean": [0.0] * 4}, "latents_mean is"),
        ({"_class_name": "AutoencoderTiny"}, "is of the class 'AutoencoderTiny'"),
        ({"block_out_channels": "many"}, "no vae can be built"),
    ],
)
def test_another_vae_is_refused(tmp_path, parts, vae, expected):
    folder = write_folder(tmp_path / "folder", parts, vae=vae)
    message = refused(folder)
    assert "folder" in message
    assert expected in message
    assert len(message) < 700


def test_a_vae_that_is_not_used_may_be_any(tmp_path, parts):
    folder = write_folder(tmp_path / "folder", parts, vae={"shift_factor": 0.1})
    assert_same(load_family(parts, folder).vae.state_dict(), parts["vae"])


def test_the_usual_scale_is_taken_where_none_is_stated_and_precision_is_the_callers(tmp_path, parts):
    folder = write_folder(tmp_path / "folder", parts, vae={"force_upcast": True, "shift_factor": None})
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_family(folder).decode(z), load_family(parts).decode(z))


def test_a_single_files_vae_of_16_channels_is_refused_as_such(parts):
    tensors = single_file(parts)
    tensors[f"{VAE}decoder.conv_in.weight"] = torch.zeros(32, 16, 3, 3)
    assert "VAE of student has 16 latent channels, but the UNet reads 4" in refused(tensors)


@pytest.mark.parametrize("size", ["64", None, 0, [64, 64]])
def test_a_size_that_is_no_number_is_refused(tmp_path, parts, size):
    folder = write_folder(tmp_path / "folder", parts, unet={"sample_size": size})
    message = refused(folder)
    assert str(folder / "unet" / "config.json") in message
    assert f"sample_size is {size!r}" in message
