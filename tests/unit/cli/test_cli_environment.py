"""`echodistill info` without a path: the environment."""

import json
import platform
import re

import torch

import echodistill_core
from echodistill_core.cli import facts, main


def test_the_environment_is_printed_as_text_and_as_json(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for line in (
        rf"echodistill +{echodistill_core.__version__}",
        rf"python +CPython {re.escape(platform.python_version())}",
        rf"torch +{re.escape(torch.__version__)}",
        "comfyui +not installed",
        "diffusers +[0-9.]+",
        "cpu +.*bf16",
    ):
        assert re.search(rf"^ *{line}", text, re.MULTILINE), line
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert set(found["devices"]) >= {"cpu"}


def test_no_path_of_this_machine_is_in_it(capsys, tmp_path):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert str(facts.Path.home()) not in text
    assert "site-packages" not in text


def test_the_version_of_the_surrounding_comfyui(tmp_path, monkeypatch):
    package = tmp_path / "ComfyUI" / "custom_nodes" / "pack" / "echodistill_core" / "cli"
    package.mkdir(parents=True)
    monkeypatch.setattr(facts, "__file__", str(package / "facts.py"))
    assert facts.environment_facts()["comfyui"] == "unknown version"
    (tmp_path / "ComfyUI" / "comfyui_version.py").write_text('# comment\n__version__ = "0.3.64"\n')
    assert facts.environment_facts()["comfyui"] == "0.3.64"
