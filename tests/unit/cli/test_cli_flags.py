"""Flags: made from the settings, parsed without importing torch."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import echodistill_core
from echodistill_core.cli import arguments, main
from echodistill_core.models.sources import ModelSources
from echodistill_core.settings import EchoSettings, TrainSettings, from_options


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
def test_openmp_threads_wait_passively_and_the_policy_is_set_before_torch_loads(tmp_path, given, found):
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
