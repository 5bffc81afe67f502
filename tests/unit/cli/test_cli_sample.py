"""`echodistill sample`."""

import errno
import os
from pathlib import Path

import pytest
import torch
from command_line import adapter_of, pixels, refused, sample_command, train_command, whole_checkpoint
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from echodistill_core.cli import main


def test_sample_takes_the_latest_stage_and_says_what_it_wrote(run_folder, capsys):
    assert main(sample_command(run_folder, "--out", "auto.png", "--seed", 3)) == 0
    assert "auto.png: 'a <my-mug> coffee mug', seed 3" in capsys.readouterr().err
    assert main(sample_command(run_folder, "--out", "echo.png", "--seed", 3, "--stage", "echo")) == 0
    assert main(sample_command(run_folder, "--out", "first.png", "--seed", 3, "--stage", "distil")) == 0
    assert pixels("auto.png") == pixels("echo.png")
    echo, first = (load_file(adapter_of(run_folder, s))["clip_h"] for s in ("echo", "distil"))
    assert not torch.equal(echo, first)  # the stages do differ, if by less than a pixel's step


def test_sample_with_an_adapter_file_is_sample_with_its_run(run_folder):
    assert main(sample_command(run_folder, "--out", "run.png")) == 0
    command = ["sample", "--adapter", str(adapter_of(run_folder, "echo")), "--prompt", "a <my-mug> coffee mug"]
    assert main([*command, "--device", "cpu", "--out", "file.png"]) == 0  # the family comes from the file's metadata
    assert pixels("file.png") == pixels("run.png")


def test_several_prompts_and_a_batch_are_numbered_and_have_seeds_in_turn(run_folder, capsys):
    prompts = ["a <my-mug> coffee mug", "a red <my-mug> coffee mug"]
    command = ["sample", str(run_folder), "--prompt", *prompts, "--batch", "2", "--seed", "5", "--device", "cpu"]
    assert main([*command, "--out", "p.jpg", "--width", "96", "--height", "72", "--steps", "2"]) == 0
    assert sorted(p.name for p in Path().glob("p*")) == [f"p_00{i}.jpg" for i in range(4)]
    for i, line in enumerate(capsys.readouterr().err.strip().splitlines()):
        assert line == f"p_00{i}.jpg: {prompts[i // 2]!r}, seed {5 + i}"
        with Image.open(f"p_00{i}.jpg") as image:
            assert (image.size, image.format) == ((96, 72), "JPEG")


def test_sample_from_a_picture_stays_near_it_at_a_low_denoise(run_folder, photographs):
    picture = str(photographs / "0.png")

    def distance(denoise):
        assert main(sample_command(run_folder, "--image", picture, "--denoise", denoise, "--out", "d.png")) == 0
        found, source = (torch.frombuffer(bytearray(p), dtype=torch.uint8).float() for p in (pixels("d.png"), flat))
        return float((found - source).abs().mean())

    assert main(sample_command(run_folder, "--image", picture, "--denoise", 0.001, "--out", "flat.png")) == 0
    flat = pixels("flat.png")  # as near as it gets; the untrained VAE hardly resembles the picture
    assert distance(0.001) == 0
    assert distance(0.05) < distance(0.9)
    wide = ["--width", 96, "--height", 64]
    assert main(sample_command(run_folder, "--image", picture, *wide, "--out", "wide.png")) == 0
    with Image.open("wide.png") as image:
        assert image.size == (96, 64)


def test_sample_with_the_teacher_with_strength_and_in_half_precision(run_folder):
    assert main(sample_command(run_folder, "--out", "full.png")) == 0
    assert main(sample_command(run_folder, "--out", "none.png", "--strength", 0)) == 0
    assert main(sample_command(run_folder, "--out", "teacher.png", "--role", "teacher", "--steps", 3)) == 0
    assert main(sample_command(run_folder, "--out", "bf16.png", "--precision", "bf16")) == 0
    assert len({pixels(f"{n}.png") for n in ("full", "none", "teacher", "bf16")}) == 4


def test_two_adapters_are_applied_together(run_folder, photographs):
    assert main(train_command(photographs, "second", "--placeholder", "<toy>", noun="toy")) == 0
    files = [str(adapter_of(run_folder)), str(adapter_of(Path("second")))]
    command = ["sample", "--adapter", *files, "--prompt", "a <my-mug> coffee mug and a <toy> toy", "--device", "cpu"]
    assert main([*command, "--strength", "1", "0.5", "--out", "both.png"]) == 0
    assert Path("both.png").is_file()


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (["--out", "a.txt"], ["a.txt is not an image file", ".png"]),
        (["--out", "a"], ["a is not an image file"]),
        (["--out", "nowhere/a.png"], ["nowhere does not exist"]),
        (["--batch", "0"], ["batch is 0; expected 1 or more"]),
        (["--batch", "two"], ["--batch", "'two'"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--seed", str(2**64)], [f"seed is {2**64}"]),
        (["--steps", "-1"], ["-1 steps do not fit"]),
        (["--width", "100"], ["size 100x64 cannot be made"]),
        (["--denoise", "0"], ["denoise is 0.0"]),
        (["--denoise", "1.5"], ["denoise is 1.5"]),
        (["--strength", "1", "2"], ["2 strengths were given for 1 adapters"]),
        (["--image", "none.png"], ["none.png"]),
        (["--adapter", "none.safetensors"], ["adapter none.safetensors does not exist"]),
        (["--device", "cuda:77"], ["device 'cuda:77' cannot be used"]),
        (["--stage", "second"], ["--stage", "'second'"]),
        (["--prompt", "a coffee mug"], ["'a coffee mug'", "placeholder <my-mug>"]),
    ],
)
def test_bad_input_of_sample(run_folder, capsys, flags, reasons):
    refused(capsys, sample_command(run_folder, "--out", "a.png", *flags), *reasons, out=".")
    assert list(Path().iterdir()) == []


def test_an_adapter_of_another_base_model(run_folder, tmp_path, capsys):
    whole_checkpoint(tmp_path / "other.safetensors")
    tensors = load_file(tmp_path / "other.safetensors")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({**tensors, name: 2 * tensors[name]}, tmp_path / "other.safetensors")
    command = sample_command(
        run_folder, "--out", "a.png", "--student", "other.safetensors", "--teacher", "other.safetensors"
    )
    refused(capsys, command, "another base model (tiny student, fingerprint", "--any-base")
    assert not Path("a.png").exists()
    assert main([*command, "--any-base"]) == 0
    assert Path("a.png").is_file()


def test_a_full_disk_while_sampling_and_exporting(run_folder, capsys, monkeypatch):
    def fail(self, *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        refused(capsys, sample_command(run_folder, "--out", "a.png"), "a.png could not be written", "No space left")
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", fail)
        refused(capsys, ["export", run_folder, "--to", "merged", "--out", "m"], "m could not be written", "No space")
    assert list(Path().iterdir()) == []
