"""Input that train, echo and info refuse: photographs, checkpoints, settings, folders."""

import json
import pickle
import shutil

import pytest
import torch
from command_line import adapter_of, refused, train_command, whole_checkpoint
from diffusers import UNet2DConditionModel
from picture_files import png_bytes
from PIL import Image
from safetensors.torch import save_file

from echodistill_core.cli import main
from echodistill_core.models.architectures import TINY


def no_folder(folder):
    folder.rmdir()


def broken_files(folder):
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "b.png").write_bytes(b"")


def no_images(folder):
    (folder / "notes.txt").write_text("hello")


def small_image(folder):
    Image.new("RGB", (63, 200)).save(folder / "thumb.png")


def bomb(folder):
    (folder / "bomb.png").write_bytes(png_bytes(60_000, 60_000, 8, 2, [b""]))


def over_our_limit(folder):
    (folder / "poster.png").write_bytes(png_bytes(9000, 9000, 8, 2, [b""]))  # 81 million: Pillow alone would take it


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (no_folder, ["there is no file or folder"]),
        (lambda folder: None, ["is empty"]),
        (no_images, ["none of them an image"]),
        (broken_files, ["not one photograph", "a.jpg (", "b.png (it is empty)"]),
        (small_image, ["thumb.png is 63x200", "64"]),
        (bomb, ["bomb.png has", "expected at most 64,000,000"]),
        (over_our_limit, ["poster.png has 9000x9000", "expected at most 64,000,000"]),
    ],
)
def test_bad_photographs(tmp_path, capsys, make, reasons):
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    refused(capsys, train_command("photos", "RUN"), *reasons)


def test_unreadable_photographs_beside_good_ones_are_named_and_left_out(photographs, tmp_path, capsys):
    shutil.copytree(photographs, tmp_path / "photos")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert main(train_command("photos", "RUN")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: photographs left out")
    assert "broken.jpg (" in lines[0]
    assert lines[1] == "dog: 3 photographs -> RUN"


def truncated(path):
    whole_checkpoint(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def sdxl(path):
    names = ["input_blocks.0.0.weight", "label_emb.0.0.weight"]
    save_file({f"model.diffusion_model.{n}": torch.zeros(1) for n in names}, path)


def flux(path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, path)


def pickled(path):
    path.write_bytes(pickle.dumps({"state_dict": {"a": list(range(50))}}))


@pytest.mark.parametrize("flag", ["--student", "--teacher"])
@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (truncated, ["truncated"]),
        (sdxl, ["looks like an SDXL UNet"]),
        (flux, ["looks like a Flux transformer"]),
        (pickled, ["is a pickle", "convert it to .safetensors"]),
    ],
)
def test_bad_checkpoints(photographs, tmp_path, capsys, flag, make, reasons):
    path = tmp_path / "model.safetensors"
    make(path)
    refused(capsys, train_command(photographs, "RUN", flag, path), path.name, *reasons)


def test_missing_checkpoints_are_missed_with_advice(photographs, capsys):
    refused(capsys, train_command(photographs, "RUN", "--student", "sd-turb"), "'sd-turb' does not exist", "sd-turbo?")
    refused(capsys, train_command(photographs, "RUN", "--student-lora", "none.safetensors"), "student_lora")


def test_a_teacher_of_another_width(photographs, tmp_path, capsys, tiny_family):
    family = tiny_family()
    wide = UNet2DConditionModel.from_config({**TINY.unet, "cross_attention_dim": 48})
    wide.save_pretrained(tmp_path / "wide" / "unet")
    for name, part in {
        "vae": family.vae,
        "text_encoder": family.text.model,
        "tokenizer": family.text.tokenizer,
    }.items():
        part.save_pretrained(tmp_path / "wide" / name)
    (tmp_path / "wide" / "scheduler").mkdir()
    (tmp_path / "wide" / "scheduler" / "scheduler_config.json").write_text(json.dumps(TINY.scheduler))
    command = train_command(photographs, "RUN", "--teacher", tmp_path / "wide")
    refused(capsys, command, "different widths", "wide reads 48", "reads 32")


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (["--placeholder", "dog"], ["'dog' is already a word"]),
        (["--placeholder", "two words"], ["'two words' cannot be a word"]),
        (["--placeholder", ""], ["placeholder '' cannot be a word"]),
        (["--class-noun", ""], ["class_noun is empty"]),
        (["--class-noun", "  "], ["class_noun is empty"]),
        (["--iterations", "ten"], ["--iterations", "'ten'"]),
        (["--iterations", "0"], ["iterations is 0; expected 1 or more"]),
        (["--iterations"], ["--iterations", "expected one argument"]),
        (["--student-lr", "nan"], ["student_lr is nan; expected 0.0 to 1.0"]),
        (["--vectors", "17"], ["vectors is 17; expected 1 to 16 tokens"]),
        (["--trainable", "everything"], ["--trainable", "'everything'", "kv+token"]),
        (["--preset", "tune"], ["--preset", "'tune'"]),
        (["--resolution", "100"], ["resolution is 100", "multiple of 8"]),
        (["--resolution", "32"], ["resolution is 32; expected 64 or more"]),
        (["--device", "cuda:77"], ["device 'cuda:77' cannot be used", "expected auto, cpu, cuda or mps"]),
        (["--device", "gpu"], ["device 'gpu' cannot be used"]),
        (["--iteration", "5"], ["--iteration;", "did you mean --iterations?"]),
        (["--swd_weight", "5"], ["--swd_weight", "did you mean --swd-weight?"]),
        (["--learning-rte=5"], ["no setting --learning-rte"]),
        (["--family", "sd-turbow"], ["--family", "'sd-turbow'"]),
        (["--backbones", "nowhere"], ["backbones folder nowhere"]),
    ],
)
def test_bad_settings(photographs, capsys, flags, reasons):
    refused(capsys, train_command(photographs, "RUN", *flags), *reasons)


def test_models_that_were_never_downloaded(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("echodistill_core.models.open.cached_folder", lambda *a, **k: None)
    command = train_command(photographs, "RUN")
    command[command.index("tiny")] = "sd-turbo"
    refused(capsys, command, "echodistill download sd-turbo-family")


def test_misspelt_names_are_suggested_before_anything_else_is_missed(capsys):
    refused(capsys, ["trian", "--photos", "x"], "no command 'trian'", "did you mean train?")
    refused(capsys, ["xyz"], "no command 'xyz'", "demo, train, echo, sample, info, export, bench, download")
    refused(capsys, ["train", "--photo", "x"], "--photo;", "did you mean --photos?")
    refused(capsys, ["sample", "RUN", "--promt", "a dog"], "--promt", "did you mean --prompt?")
    refused(capsys, ["echo", "RUN", "--pool-sise=3"], "--pool-sise", "did you mean --pool-size?")
    refused(capsys, [], "required: command")
    refused(capsys, ["train"], "required: --photos")
    refused(capsys, ["info", "a", "b"], "unrecognized arguments: b")


def test_out_folders_that_are_taken(run_folder, photographs, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    refused(capsys, train_command(photographs, run), "holds another run", "class_noun is 'coffee mug' there", out=run)
    other = train_command(
        photographs, run, "--placeholder", "<my-mug>", "--vectors", 2, "--seed", 1, noun="coffee mug", iterations=3
    )
    refused(capsys, other, "holds another run", "seed is 0 there and 1 here", out=run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(capsys, train_command(photographs, "mine"), "mine is not empty and holds no run", out="mine")
    (tmp_path / "file").write_text("x")
    refused(capsys, train_command(photographs, "file"), "file is a file")
    assert (tmp_path / "file").read_text() == "x"
    refused(capsys, ["export", run, "--to", "merged", "--out", "mine"], "mine exists already", out="mine")


def test_runs_that_are_none_or_not_ready(run_folder, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for command in (["echo", "folder"], ["info", "folder"], ["sample", "folder", "--prompt", "a dog"]):
        refused(capsys, command, "folder is no run folder", "run.json")
    refused(capsys, ["echo", "nowhere"], "nowhere is no run folder")
    run = shutil.copytree(run_folder, tmp_path / "run")
    refused(capsys, ["echo", run, "--iterations", 5], "iterations is 2 there and 5 here", out=run)
    shutil.rmtree(run / "echo")
    refused(capsys, ["sample", run, "--stage", "echo", "--prompt", "x"], "has no echo/student.safetensors", out=run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, "finished": {}, "echo": None}))
    refused(capsys, ["echo", run], "is not trained to its end", out=run)
    remedies = f"echodistill sample --adapter {adapter_of(run)}", "the train command"
    for damage, how in (("{", "no JSON"), ("", "empty (0 bytes)"), ("\0" * 900, "empty (900 bytes)"), ("[]", "lacks")):
        (run / "run.json").write_text(damage)
        refused(capsys, ["info", run], f"run.json {'' if how == 'lacks' else 'is '}{how}", *remedies, out=run)
    (run / "run.json").write_text(json.dumps({**record, "format_version": 99}))
    refused(capsys, ["info", run], "format version 99", out=run)
