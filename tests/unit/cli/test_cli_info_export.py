"""`echodistill info` and `echodistill export`."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from command_line import adapter_of, refused
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from echodistill_core.adapter.file import read_adapter
from echodistill_core.cli import main


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
