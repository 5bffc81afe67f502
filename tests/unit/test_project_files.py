"""The project's files agree with each other."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import echodistill_core
from tools.requirements import FROM_COMFYUI

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(echodistill_core.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
YAML = (*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_requirements_are_pyprojects_dependencies_without_torch():
    listed = [line for line in text("requirements.txt").splitlines() if not line.startswith("#")]
    left_out = [line for line in PROJECT["dependencies"] if line not in listed]
    assert [line for line in PROJECT["dependencies"] if line in listed] == listed
    assert [re.match(r"\w+", line)[0] for line in left_out] == list(FROM_COMFYUI)


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_files_parse(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert echodistill_core.__version__ == version
    assert str(yaml.safe_load(text("CITATION.cff"))["version"]) == version
    assert f"## [{version}]" in text("CHANGELOG.md")


def test_the_workflow_runs_the_check_command():
    steps = yaml.safe_load(text(".github/workflows/check.yml"))["jobs"]["check"]["steps"]
    assert any(step.get("run", "").strip().endswith("sh tests/run") for step in steps)


def test_the_bug_form_asks_for_the_environment():
    form = yaml.safe_load(text(".github/ISSUE_TEMPLATE/bug.yml"))
    assert any("echodistill info" in str(item) for item in form["body"] if item.get("validations", {}).get("required"))
