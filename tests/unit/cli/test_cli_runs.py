"""Runs on the command line: contents of the run folder, output on the terminal, full disks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PACKAGE_PARENT, adapter_of, full_disk_for, train_command
from PIL import Image
from safetensors.torch import load_file

from echodistill_core.adapter.file import read_adapter
from echodistill_core.cli import main


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
        assert {"recon_teacher", "identity", "mse", "swd", "alignment", "adv_dino", "critic_clip"} <= rows[0].keys()
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
    assert any(
        re.search(r"distil: 100%.* 2/2 .*it/s, recon_teacher=\d.*alignment=\d.*adv_dino=\d", line) for line in lines
    )
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
