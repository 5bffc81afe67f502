"""The full-architecture benchmark at tiny scale: it passes on correct files and detects one flipped bit."""

import collections
import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import architecture_jobs as jobs
from benchmarks import full_architecture, machine
from benchmarks import random_checkpoint as rc
from echodistill_core.errors import EchoDistillError

TEACHER_BIAS = "model.diffusion_model.middle_block.0.in_layers.0.bias"


@pytest.fixture
def tiny(tmp_path):
    """Run the command at tiny scale; returns its status and JSON."""

    def run(*arguments):
        out = tmp_path / "figures.json"
        status = full_architecture.main(
            ["--scale", "tiny", "--folder", str(tmp_path / "work"), "--out", str(out), *arguments]
        )
        return status, json.loads(out.read_text(encoding="utf-8"))

    return run


def test_a_tiny_run_passes_and_prints_its_figures(tiny, tmp_path, capsys):
    status, figures = tiny()
    printed = capsys.readouterr().out

    assert status == 0
    assert figures["passed"] is True
    assert [c["name"] for c in figures["checks"] if not c["passed"]] == []
    assert [(load["what"], load["mismatches"]) for load in figures["loads"]] == [
        ("SD 2.1, folder", 0),
        ("SD-Turbo, folder", 0),
        ("SD 2.1 and SD-Turbo, folder", 0),
        ("SD 2.1, file", 0),
        ("SD-Turbo, file", 0),
        ("SD 2.1 and SD-Turbo, file", 0),
    ]
    assert figures["loads"][2]["predictions"] == {"teacher": "v_prediction", "student": "epsilon"}
    assert all(load["tensors"] > 500 and load["bytes"] > 6e6 and load["seconds"] > 0 for load in figures["loads"])
    assert all(
        load["memory"]["loaded"]["peak"] is None for load in figures["loads"]
    )  # jobs share this process at tiny scale
    assert figures["adapter"]["matrices"] == 14  # 7 blocks with attention, each with a key and a value
    assert figures["machine"]["cores"] == os.cpu_count()
    assert figures["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert figures["command"].startswith("python -m benchmarks.full_architecture --scale tiny")
    assert "SD 2.1 and SD-Turbo, file" in printed
    assert f"checks: {len(figures['checks'])} of {len(figures['checks'])} passed" in printed
    assert list((tmp_path / "work").iterdir()) == []


def flip_last_bit(path, name):
    """Change one bit of a tensor in a float16 safetensors file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_one_flipped_bit_is_a_mismatch(tiny, monkeypatch, capsys):
    original = full_architecture.write

    def corrupting(folder, file, role, scale, dtype):
        result = original(folder, file, role, scale, dtype)
        if role == "teacher":
            flip_last_bit(full_architecture.Path(file), TEACHER_BIAS)
        return result

    monkeypatch.setattr(full_architecture, "write", corrupting)
    status, figures = tiny()

    assert status == 1
    assert figures["passed"] is False
    bias = "unet.mid_block.resnets.0.norm1.bias"
    assert {c["name"]: c["detail"]["mismatches"] for c in figures["checks"] if not c["passed"]} == {
        "SD 2.1, file: equal to what was written": [f"teacher.{bias}"],
        "SD 2.1 and SD-Turbo, file: equal to what was written": [f"teacher.{bias}"],
        "SD 2.1: folder equal to file": [f"teacher.{bias}"],
        "SD 2.1 and SD-Turbo: folder equal to file": [f"teacher.{bias}"],
        "SD 2.1, file: diffusers' converter gives what was written": [bias],
    }
    assert [load["mismatches"] for load in figures["loads"]] == [0, 0, 0, 1, 0, 1]
    assert "FAILED: SD 2.1, file: equal to what was written: {" in capsys.readouterr().out


def test_a_refused_checkpoint_is_a_failure(tmp_path, monkeypatch, capsys):
    def truncating(folder, file, role, scale, dtype):
        full_architecture.Path(folder).mkdir()
        full_architecture.Path(file).write_bytes(b"")
        return {"hashes": {}, "numbers": {}}

    monkeypatch.setattr(full_architecture, "write", truncating)
    assert full_architecture.main(["--scale", "tiny", "--folder", str(tmp_path)]) == 1
    assert "just written was refused" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_single_files_have_the_tensors_of_the_published_ones(tmp_path):
    architecture = rc.SCALES["tiny"]
    for role, prefix in (("teacher", "cond_stage_model.model."), ("student", "conditioner.embedders.0.model.")):
        networks = rc.random_checkpoint(role, architecture, torch.float16)
        path = tmp_path / f"{role}.safetensors"
        numbers = rc.write_file(path, role, networks, architecture)
        text = {n.removeprefix(prefix): t for n, t in load_file(path).items() if n.startswith(prefix)}
        layers = {n.split(".")[2] for n in text if n.startswith("transformer.resblocks.")}
        assert layers == {"0", "1", "2"}  # the two of the network, and OpenCLIP's unused last one
        assert text["text_projection"].shape == (32, 32)
        assert text["logit_scale"].shape == ()
        assert numbers == {"text_encoder_in_file": sum(t.numel() for t in text.values())}
        with safe_open(path, framework="pt") as file:
            assert not any(n.startswith(("cond", "text")) and not n.startswith(prefix) for n in file.keys())  # noqa: SIM118


def test_the_bias_that_reveals_the_prediction_type_is_on_the_correct_side_of_the_threshold(monkeypatch):
    name = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    shapes = {"unet": {name: torch.empty(320, device="meta")}, "text_encoder": {}, "vae": {}}
    monkeypatch.setattr(rc, "empty_networks", lambda architecture: shapes)
    deviation = {
        role: float(rc.random_checkpoint(role, rc.SCALES["full"], torch.float16)["unet"][name].float().std())
        for role in ("teacher", "student")
    }
    assert deviation["teacher"] == pytest.approx(0.18, rel=1e-2)
    assert deviation["student"] == pytest.approx(0.045, rel=1e-2)


def test_the_hash_depends_on_dtype_shape_and_every_byte():
    tensor = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    expected = hashlib.sha256(b"torch.float16(2, 3)" + tensor.numpy().tobytes()).hexdigest()
    assert rc.tensor_hash(tensor) == expected
    assert rc.tensor_hash(tensor.T.contiguous().T) == expected  # strides do not matter
    others = [tensor.reshape(3, 2), tensor.float(), tensor.view(torch.int16), tensor + 1]
    assert expected not in {rc.tensor_hash(other) for other in others}


def test_compare_lists_missing_additional_and_changed_names():
    assert jobs.compare({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == ["b", "c", "d"]


def test_too_little_disk_space_is_refused_before_writing(tmp_path, monkeypatch, capsys):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(full_architecture.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(full_architecture, "write", lambda *arguments: pytest.fail("a file was written"))
    assert full_architecture.main(["--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "0.0 GB free" in error
    assert "11.4 GB" in error  # 4 x 1,289,952,427 numbers x 2 bytes, and a tenth more
    assert "--folder" in error
    assert list(tmp_path.iterdir()) == []


def test_a_job_runs_in_a_new_process_and_a_killed_one_is_reported():
    assert jobs.run_isolated(False, os.getpid) == os.getpid()
    assert jobs.run_isolated(True, os.getpid) != os.getpid()
    with pytest.raises(EchoDistillError, match="the process of _exit was killed"):
        jobs.run_isolated(True, os._exit, 9)


@pytest.mark.skipif(machine.memory().now is None, reason="the system does not report memory")
def test_memory_includes_allocations():
    before = machine.memory()
    block = bytearray(b"x" * 2**26)
    after = machine.memory()
    assert after.anonymous - before.anonymous > 0.9 * len(block)
    assert after.peak >= after.now > 0
