"""The command line as a user meets it: whole runs, what is said about bad input, Ctrl-C, and what lies on the disk."""

import copy
import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import echodistill_core
from echodistill_core import reporting
from echodistill_core.adapter.file import read_adapter
from echodistill_core.cli import arguments, commands, main
from echodistill_core.errors import InputError
from echodistill_core.files import write_bytes
from echodistill_core.models import download as downloads
from echodistill_core.models.architectures import TINY
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.models.tiny import tiny_checkpoint
from echodistill_core.settings import EchoSettings, TrainSettings, from_options
from echodistill_core.training.events import StepDone

PLOT_LOSSES = reporting.plot_losses
PACKAGE_PARENT = Path(echodistill_core.__file__).parents[1]
QUICK = ["--batch-size", "1", "--swd-projections", "8", "--device", "cpu", "--log-every", "1", "--preview-every", "0"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Commands may write where they are called, so every test has its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """The plain tiny family is copied instead of made anew, and losses are not drawn: most of a small run's time."""
    made = {}

    def open_family_once(sources, *, with_teacher=True):
        if dataclasses.replace(sources, backbones="") != ModelSources(family="tiny"):
            return open_family(sources, with_teacher=with_teacher)
        if with_teacher not in made:
            made[with_teacher] = open_family(sources, with_teacher=with_teacher)
        tokenizer = made[with_teacher].text.tokenizer  # nothing changes it, and it takes longest to copy
        return copy.deepcopy(made[with_teacher], {id(tokenizer): tokenizer})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "open_family", open_family_once)
        patch.setattr(reporting, "plot_losses", lambda rows, path, title: write_bytes(path, b"a plot"))
        yield


def train_command(photos, out, *more, noun="dog", iterations=1):
    command = ["train", "--family", "tiny", "--photos", str(photos), "--class-noun", noun]
    return [*command, "--iterations", str(iterations), "--out", str(out), *QUICK, *map(str, more)]


@pytest.fixture(scope="module")
def run_folder(photographs, tmp_path_factory):
    """A finished and echoed run of two-word noun, own placeholder and two rows. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "mug"
    flags = ["--placeholder", "<my-mug>", "--vectors", "2", "--preview-every", "2", "--checkpoint-every", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "plot_losses", PLOT_LOSSES)
        assert main(train_command(photographs, folder, *flags, noun="coffee mug", iterations=3)) == 0
        assert main(["echo", str(folder), "--iterations", "2", "--pool-size", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    """A run of two iterations that nothing interrupted. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "control"
    assert main(train_command(photographs, folder, iterations=2)) == 0
    return folder


def adapter_of(run, stage="distil", role="student"):
    return run / stage / f"{role}.safetensors"


# Whole runs


def test_a_run_folder_holds_what_was_promised(run_folder, photographs):
    record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["class_noun"] == "coffee mug"
    assert record["settings"]["vectors"] == 2
    assert record["sources"]["family"] == "tiny"
    assert record["photographs"] == ["0.png", "1.png", "2.png"]
    assert {s: f["iterations"] for s, f in record["finished"].items()} == {"distil": 3, "echo": 2}
    for stage, iterations in (("distil", 3), ("echo", 2)):
        rows = [json.loads(line) for line in (run_folder / stage / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, iterations + 1))
        assert {"teacher", "identity", "mse", "swd", "alignment", "adv_dino", "critic_clip"} <= rows[0].keys()
        with Image.open(run_folder / stage / "losses.png") as plot:
            assert plot.format == "PNG"
            assert 800 <= plot.width <= 3000
            assert 300 <= plot.height <= 3000
        for role in ("student", "teacher"):
            adapter = read_adapter(adapter_of(run_folder, stage, role))
            assert (adapter.placeholder, adapter.class_noun) == ("<my-mug>", "coffee mug")
            assert adapter.token_embeddings.shape == (2, 32)
            assert adapter.metadata["stage"] == stage
    # Every 2 steps and at the end; four pictures of 64 pixels in a row, with gaps of 4.
    sheets = {p.parent.parent.name + "/" + p.name for p in run_folder.rglob("samples/*.png")}
    assert sheets == {"distil/step_000002.png", "distil/step_000003.png", "echo/step_000002.png"}
    for path in run_folder.rglob("samples/*.png"):
        with Image.open(path) as sheet:
            assert sheet.size == (4 * 68 + 4, 68 + 4)
            assert len(sheet.getcolors(100_000)) > 500
    assert [p.name for p in sorted((run_folder / "echo" / "pool").glob("*.png"))] == ["000.png", "001.png"]
    assert not list(run_folder.rglob("*.tmp"))


def test_what_a_user_reads_during_a_run(photographs, tmp_path, capsys):
    assert main(train_command(photographs, "RUN", "--max-photographs", 1, iterations=2)) == 0
    printed = capsys.readouterr()
    assert printed.out == ""  # it is for programs; what is told goes to stderr
    lines = re.split(r"[\r\n]+", printed.err.strip())
    assert lines[0] == "dog: 1 photograph -> RUN"
    assert any(re.search(r"distil: 100%.* 2/2 .*it/s, teacher=\d.*alignment=\d.*adv_dino=\d", line) for line in lines)
    student = Path("RUN", "distil", "student.safetensors")
    assert any(line.strip().startswith(f"{student} (") for line in lines)
    assert lines[-1].startswith("next: echodistill echo RUN, or echodistill sample RUN")
    assert '"a <new1> dog on the beach"' in lines[-1]
    assert "Warning" not in printed.err


def test_a_finished_run_is_not_trained_again(run_folder, photographs, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    flags = ["--placeholder", "<my-mug>", "--vectors", "2"]
    assert main(train_command(photographs, run, *flags, noun="coffee mug", iterations=3)) == 0
    assert "finished after 3 iterations" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} == before


def test_without_out_the_same_command_finds_its_run_again(photographs, tmp_path, capsys):
    command = [a for a in train_command(photographs, "", noun="toy/cat") if a not in ("--out", "")]
    assert main(command) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"toy-cat-[0-9a-f]{8}", folder.name)
    written = adapter_of(folder).stat().st_mtime_ns
    assert main(command) == 0
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert adapter_of(folder).stat().st_mtime_ns == written


@pytest.mark.slow
def test_as_a_program_of_its_own_on_one_photograph(make_photographs, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(make_photographs() / "0.png", folder)
    done = subprocess.run(
        [sys.executable, "-m", "echodistill_core", *train_command(folder, tmp_path / "RUN")],
        cwd=PACKAGE_PARENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dog: 1 photograph ->" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(load_file(adapter_of(tmp_path / "RUN"))) == 14 + 1


# sample


def sample_command(run, *more):
    return ["sample", str(run), "--prompt", "a <my-mug> coffee mug", "--device", "cpu", *map(str, more)]


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


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


def test_two_adapters_are_worn_together(run_folder, photographs):
    assert main(train_command(photographs, "second", "--placeholder", "<toy>", noun="toy")) == 0
    files = [str(adapter_of(run_folder)), str(adapter_of(Path("second")))]
    command = ["sample", "--adapter", *files, "--prompt", "a <my-mug> coffee mug and a <toy> toy", "--device", "cpu"]
    assert main([*command, "--strength", "1", "0.5", "--out", "both.png"]) == 0
    assert Path("both.png").is_file()


# info


def test_info_of_a_run_and_of_an_adapter(run_folder, capsys):
    assert main(["info", str(run_folder)]) == 0
    text = capsys.readouterr().out
    assert "coffee mug" in text
    assert "echo/student.safetensors" in text.replace(os.sep, "/")
    assert max(map(len, text.splitlines())) < 120  # a terminal's width, not one long line of JSON
    assert main(["info", str(run_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"]["placeholder"] == "<my-mug>"
    assert len(facts["adapters"]) == 4

    assert main(["info", str(adapter_of(run_folder))]) == 0
    text = capsys.readouterr().out
    for line in ("placeholder .*<my-mug>", "weights .*14 tensors, 22528 numbers", "token .*2 row", "base_model .*tiny"):
        assert re.search(line, text), line
    assert "photographs" in text
    assert main(["info", str(adapter_of(run_folder)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # 7 places of 2 matrices: widths 32, 64, 64 (middle), 64, 64, 32, 32 by text features 32 wide.
    assert 2 * 32 * (32 + 64 + 64 + 64 + 64 + 32 + 32) == 22528
    assert facts["settings"]["class_noun"] == "coffee mug"
    assert facts["base_licences"]["student"] == "MIT (random weights)"


def test_info_survives_metadata_that_is_no_json(run_folder, tmp_path, capsys):
    tensors, facts = load_file(adapter_of(run_folder)), dict(read_adapter(adapter_of(run_folder)).metadata)
    save_file(tensors, tmp_path / "odd.safetensors", {**facts, "settings": "{half", "base_licences": "CC0"})
    assert main(["info", "odd.safetensors"]) == 0
    assert "{half" in capsys.readouterr().out


# export


def test_export_lora_reports_each_matrix_and_names_both_files(run_folder, capsys):
    assert main(["export", str(run_folder), "--to", "lora", "--rank", "3", "--out", "mug.safetensors"]) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert len(rows) == 14
    delta = load_file(adapter_of(run_folder, "echo"))
    delta = delta["diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.diff"].double()
    values = torch.linalg.svdvals(delta)
    reported = {name: float(error) for error, name in rows}
    expected = float(values[3:].norm() / values.norm())
    assert reported["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == pytest.approx(expected, 1e-3)
    assert f"14 matrices at rank 3, worst relative error {max(reported.values()):.3g}" in printed.err
    assert "mug_token.safetensors: the token <my-mug>" in printed.err
    assert torch.equal(
        load_file("mug_token.safetensors")["<my-mug>"], load_file(adapter_of(run_folder, "echo"))["clip_h"]
    )


def test_export_merged_from_an_adapter_file_and_for_the_teacher(run_folder, capsys):
    assert main(["export", str(adapter_of(run_folder)), "--to", "merged", "--out", "student"]) == 0
    assert "StableDiffusionPipeline.from_pretrained" in capsys.readouterr().err
    assert main(["export", str(run_folder), "--role", "teacher", "--to", "merged", "--out", "teacher"]) == 0
    student, teacher = (StableDiffusionPipeline.from_pretrained(name) for name in ("student", "teacher"))
    assert student.scheduler.config.prediction_type == "epsilon"
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    assert student.tokenizer.convert_tokens_to_ids("<my-mug>_1") == 49409


# Bad input


def refused(capsys, command, *reasons, out="RUN"):
    """Check that a command ends with status 2 and one sentence, and leaves no out folder behind."""
    capsys.readouterr()
    existed = {p: p.stat().st_mtime_ns for p in Path(out).rglob("*")} if out and Path(out).exists() else None
    assert main([str(a) for a in command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, sentence = printed.err.strip("\n").splitlines()
    assert all(re.fullmatch(r"[\w ]+: \d photographs? -> .*", line) for line in before), printed.err
    assert re.fullmatch(r"echodistill: \S.*\.", sentence)
    for reason in reasons:
        assert str(reason) in sentence
    now = {p: p.stat().st_mtime_ns for p in Path(out).rglob("*")} if out and Path(out).exists() else None
    assert now == existed


def png_of_claimed_size(path, width, height):
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


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
    png_of_claimed_size(folder / "bomb.png", 60_000, 60_000)


def over_our_limit(folder):
    png_of_claimed_size(folder / "poster.png", 9000, 9000)  # 81 million: Pillow alone would take it


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (no_folder, ["there is no file or folder"]),
        (lambda folder: None, ["is empty"]),
        (no_images, ["none of them an image"]),
        (broken_files, ["not one photograph", "a.jpg (", "b.png (it is empty)"]),
        (small_image, ["thumb.png is 63x200 pixels; expected at least 64"]),
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
    assert lines[0].startswith("warning: photographs left out because they could not be used: broken.jpg (")
    assert lines[1] == "dog: 3 photographs -> RUN"


def whole_checkpoint(path):
    from echodistill_core.models.layout import to_original

    parts = tiny_checkpoint("student")
    save_file(to_original(parts["unet"], parts["text_encoder"], parts["vae"], TINY), path)


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
        (["--placeholder", "dog"], ["'dog' is already a word of the vocabulary"]),
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
        (["--iteration", "5"], ["no setting --iteration; did you mean --iterations?"]),
        (["--swd_weight", "5"], ["no setting --swd_weight; did you mean --swd-weight?"]),
        (["--learning-rte=5"], ["no setting --learning-rte"]),
        (["--family", "sd-turbow"], ["--family", "'sd-turbow'"]),
        (["--backbones", "nowhere"], ["backbones folder nowhere does not exist"]),
    ],
)
def test_bad_settings(photographs, capsys, flags, reasons):
    refused(capsys, train_command(photographs, "RUN", *flags), *reasons)


def test_models_that_were_never_downloaded(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("echodistill_core.models.open.cached_folder", lambda *a, **k: None)
    command = train_command(photographs, "RUN")
    command[command.index("tiny")] = "sd-turbo"
    refused(capsys, command, "nothing is downloaded unasked; run: echodistill download sd-turbo-family")


def test_misspelt_names_are_suggested_before_anything_else_is_missed(capsys):
    refused(capsys, ["trian", "--photos", "x"], "no command 'trian'", "did you mean train?")
    refused(capsys, ["xyz"], "no command 'xyz'", "demo, train, echo, sample, info, export, bench, download")
    refused(capsys, ["train", "--photo", "x"], "no setting --photo; did you mean --photos?")
    refused(capsys, ["sample", "RUN", "--promt", "a dog"], "no setting --promt; did you mean --prompt?")
    refused(capsys, ["echo", "RUN", "--pool-sise=3"], "no setting --pool-sise; did you mean --pool-size?")
    refused(capsys, [], "required: command")
    refused(capsys, ["train"], "required: --photos")
    refused(capsys, ["info", "a", "b"], "unrecognized arguments: b")


def test_out_folders_that_are_taken(run_folder, photographs, tmp_path, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    refused(capsys, train_command(photographs, run), "holds another run", "class_noun is 'coffee mug' there", out=run)
    other = train_command(
        photographs, run, "--placeholder", "<my-mug>", "--vectors", 2, "--seed", 1, noun="coffee mug", iterations=3
    )
    refused(capsys, other, "holds another run: seed is 0 there and 1 here", out=run)
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
        refused(capsys, command, "folder is no run folder: it has no run.json")
    refused(capsys, ["echo", "nowhere"], "nowhere is no run folder")
    run = shutil.copytree(run_folder, tmp_path / "run")
    refused(capsys, ["echo", run, "--iterations", 5], "other settings: iterations is 2 there and 5 here", out=run)
    shutil.rmtree(run / "echo")
    refused(capsys, ["sample", run, "--stage", "echo", "--prompt", "x"], "has no echo/student.safetensors", out=run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, "finished": {}, "echo": None}))
    refused(capsys, ["echo", run], "is not trained to its end", out=run)
    remedies = f"echodistill sample --adapter {adapter_of(run)}", "the train command that made the run"
    for damage, how in (("{", "no JSON"), ("", "empty (0 bytes)"), ("\0" * 900, "empty (900 bytes)"), ("[]", "lacks")):
        (run / "run.json").write_text(damage)
        refused(capsys, ["info", run], f"run.json {'' if how == 'lacks' else 'is '}{how}", *remedies, out=run)
    (run / "run.json").write_text(json.dumps({**record, "format_version": 99}))
    refused(capsys, ["info", run], "format version 99", out=run)


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (["--out", "a.txt"], ["a.txt is no picture file; expected a name ending in .png"]),
        (["--out", "a"], ["a is no picture file"]),
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
        (["--prompt", "a coffee mug"], ["'a coffee mug' does not contain the placeholder <my-mug>"]),
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
    refused(capsys, command, "was trained on another base model (tiny student, fingerprint", "allow it with --any-base")
    assert not Path("a.png").exists()
    assert main([*command, "--any-base"]) == 0
    assert Path("a.png").is_file()


def test_adapters_that_are_none(tmp_path, capsys):
    save_file({"lora_up": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for command in (
        ["info"],
        ["sample", "--prompt", "x", "--adapter"],
        ["export", "--to", "lora", "--out", "x.safetensors"],
    ):
        refused(capsys, [*command, "lora.safetensors"], "lora.safetensors is no EchoDistill adapter")
        refused(capsys, [*command, "none.safetensors"], "none.safetensors does not exist")


def test_bad_input_of_export(run_folder, capsys):
    command = ["export", run_folder, "--to", "lora", "--out"]
    refused(capsys, [*command, "a.safetensors", "--rank", 0], "rank is 0")
    refused(capsys, [*command, "a.bin"], "does not end in .safetensors")
    refused(capsys, ["export", run_folder, "--out", "a"], "required: --to")
    assert list(Path().iterdir()) == []


def full_disk_for(monkeypatch, name):
    """Make the final rename of files of this name fail as on a full disk."""
    replace = Path.replace

    def fail(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)


@pytest.mark.parametrize("name", ["run.json", "checkpoint.safetensors", "student.safetensors", "losses.png"])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on(
    photographs, undisturbed, capsys, monkeypatch, name
):
    command = train_command(photographs, "RUN", iterations=2)
    with monkeypatch.context() as patch:
        full_disk_for(patch, name)
        assert main(command) == 2
    lines = [x for x in re.split(r"[\r\n]+", capsys.readouterr().err) if x.startswith("echodistill: ")]
    assert len(lines) == 1
    assert name in lines[0]
    assert "No space left on device; free space" in lines[0]
    left = {p.name for p in Path("RUN").rglob("*") if p.is_file()}
    assert not {n for n in left if n.endswith(".tmp")}
    assert name not in left
    if name == "run.json":
        assert left == set()
    assert main(command) == 0
    assert adapter_of(Path("RUN")).read_bytes() == adapter_of(undisturbed).read_bytes()


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


# Flags


@pytest.mark.parametrize(
    ("command", "cls"),
    [
        ("train", TrainSettings),
        ("train", ModelSources),
        ("echo", EchoSettings),
        ("sample", ModelSources),
        ("export", ModelSources),
    ],
)
def test_every_setting_has_a_flag_with_its_default_and_reason_in_the_help(capsys, monkeypatch, command, cls):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(dataclasses.fields(cls)) >= 6
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        (line,) = re.findall(rf"^  {flag}[ ,].*(?:\n {{10,}}.*)*", text, re.MULTILINE)
        assert field.metadata["reason"] in line
        assert f"(default: {field.default})" in line
        assert field.metadata["unit"] in line


def test_flags_reach_the_settings_over_the_preset():
    def settings(*flags):
        parsed = arguments.parse(arguments.build_parser(), ["train", "--photos", "x", "--class-noun", "cat", *flags])
        return from_options(TrainSettings, arguments.given(parsed, TrainSettings))

    assert settings() == TrainSettings(class_noun="cat")
    chosen = settings("--preset", "tuned", "--no-augment", "--image-every=1", "--swd-weight=0.5", "--seed", "7")
    assert (chosen.augment, chosen.swd_weight, chosen.seed) == (False, 0.5, 7)
    assert chosen.backbone_normalisation  # of the preset
    assert chosen.image_every == 1  # the flag wins over the preset


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_are_told_to_sleep_before_torch_is_loaded(tmp_path, given, found):
    """OpenMP reads it once, when torch loads it: a stand-in for torch says what was there by then."""
    (tmp_path / "torch.py").write_text("import os; raise SystemExit(str(os.environ.get('GOMP_SPINCOUNT')))")
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {**given, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(echodistill_core.__file__).parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-m", "echodistill_core", "info", "x"], env=environment, capture_output=True, text=True
    )
    assert done.stderr.strip() == found


def test_help_and_version_need_no_models(capsys):
    for flags in (["--help"], ["--version"], ["download", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 0
    assert echodistill_core.__version__ in capsys.readouterr().out


# Ctrl-C


class Interrupter:
    """A progress bar that presses Ctrl-C once, after this many iterations of the stage."""

    def __init__(self, stage, step):
        self.stage, self.step, self.done = stage, step, []

    def __call__(self, event):
        if isinstance(event, StepDone):
            self.done.append(event.step)
            if (event.stage, event.step) == (self.stage, self.step):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_after_the_iteration_and_resumes_to_the_same_bytes(photographs, undisturbed, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    train = train_command(photographs, "RUN", iterations=2)
    interrupter = Interrupter("distil", 1)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: interrupter)
        assert main(train) == 130
    assert interrupter.done == [1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stopping after this iteration" in printed.err
    assert "interrupted; the same command goes on from the last checkpoint." in printed.err
    assert "Traceback" not in printed.err
    assert signal.getsignal(signal.SIGINT) is before
    assert not adapter_of(Path("RUN")).exists()

    again = Interrupter("distil", 99)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: again)
        assert main(train) == 0
    assert again.done == [2]  # it went on rather than began anew
    shutil.copytree(undisturbed, "CONTROL")

    echo = ["--iterations", "2", "--pool-size", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: Interrupter("echo", 1))
        assert main(["echo", "RUN", *echo]) == 130
    assert main(["echo", "RUN", *echo]) == 0
    assert main(["echo", "CONTROL", *echo]) == 0
    files = [
        f"{s}/{n}" for s in ("distil", "echo") for n in ("student.safetensors", "teacher.safetensors", "log.jsonl")
    ]
    for name in [*files, "distil/checkpoint.safetensors", "echo/checkpoint.safetensors", "echo/pool/001.png"]:
        assert Path("RUN", name).read_bytes() == Path("CONTROL", name).read_bytes(), name


def test_a_second_ctrl_c_stops_at_once(photographs, capsys, monkeypatch):
    def twice(event):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(commands, "ProgressBar", lambda: twice)
    assert main(train_command(photographs, "RUN", iterations=4)) == 130
    assert capsys.readouterr().err.count("stopping after this iteration") == 1


def test_ctrl_c_elsewhere_promises_no_checkpoint(capsys, monkeypatch):
    def press(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "read_adapter", press)
    assert main(["info", "a.safetensors"]) == 130
    assert capsys.readouterr().err == "echodistill: interrupted.\n"


# download


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the download command asked of the hub: a list of ("plan" or "download", names, endpoint, cache)."""
    calls = []
    planned = [
        downloads.PlannedFile("dino", "facebook/dino-vits16", "model.safetensors", 87_000_000, "Apache-2.0", False)
    ]

    def plan(names, endpoint=None, cache_dir=None):
        calls.append(("plan", list(names), endpoint, cache_dir))
        return planned

    def download(files, endpoint=None, cache_dir=None):
        calls.append(("download", [f.name for f in files], endpoint, cache_dir))
        return {"dino": tmp_path / "cache"}

    monkeypatch.setattr(downloads, "plan", plan)
    monkeypatch.setattr(downloads, "download", download)
    calls.append(planned)
    return calls


def answer(monkeypatch, text, tty=True):
    monkeypatch.setattr("sys.stdin.isatty", lambda: tty, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or text)
    return asked


def test_nothing_is_downloaded_where_nobody_can_agree(hub, monkeypatch, capsys):
    asked = answer(monkeypatch, "y", tty=False)
    assert main(["download", "dino"]) == 2
    printed = capsys.readouterr()
    assert "87.0" in printed.out  # the plan is shown all the same
    assert "Apache-2.0" in printed.out
    assert (
        printed.err
        == "echodistill: nothing was downloaded: nobody is there to agree; add --yes to start without asking.\n"
    )
    assert [c[0] for c in hub[1:]] == ["plan"]
    assert asked == []


@pytest.mark.parametrize("text", ["", "n", "no", "what?"])
def test_nothing_is_downloaded_without_a_yes(hub, monkeypatch, capsys, text):
    asked = answer(monkeypatch, text)
    assert main(["download", "dino"]) == 0
    assert len(asked) == 1
    assert [c[0] for c in hub[1:]] == ["plan"]
    assert "nothing was downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["y", "YES "])
def test_a_yes_downloads_what_was_planned(hub, monkeypatch, capsys, text):
    answer(monkeypatch, text)
    assert main(["download", "dino", "--endpoint", "https://mirror.example", "--cache-dir", "here"]) == 0
    assert hub[1:] == [
        ("plan", ["dino"], "https://mirror.example", "here"),
        ("download", ["dino"], "https://mirror.example", "here"),
    ]
    assert "dino: " in capsys.readouterr().err


def test_yes_asks_nobody(hub, monkeypatch):
    asked = answer(monkeypatch, "n", tty=False)
    assert main(["download", "dino", "--yes"]) == 0
    assert asked == []
    assert [c[0] for c in hub[1:]] == ["plan", "download"]


def test_what_is_here_already_is_not_asked_for(hub, monkeypatch):
    hub[0][0] = dataclasses.replace(hub[0][0], cached=True)
    asked = answer(monkeypatch, "y")
    assert main(["download", "dino"]) == 0
    assert asked == []
    assert [c[0] for c in hub[1:]] == ["plan"]


@pytest.mark.parametrize("step", ["plan", "download"])
def test_errors_of_the_hub_pass_through(hub, monkeypatch, capsys, step):
    def fail(*args, **options):
        raise InputError("the hub cannot be reached; check the connection.")

    monkeypatch.setattr(downloads, step, fail)
    assert main(["download", "dino", "--yes"]) == 2
    assert capsys.readouterr().err == "echodistill: the hub cannot be reached; check the connection.\n"


def test_an_unknown_name_is_answered_without_the_network(capsys):
    refused(capsys, ["download", "sd-turbo-familly", "--yes"], "sd-turbo-familly", "sd-turbo-family")
