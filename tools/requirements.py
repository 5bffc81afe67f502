"""Writes requirements.txt from the dependencies in pyproject.toml: python -m tools.requirements."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# The build of torch for the machine's GPU is chosen when ComfyUI is installed; pip must not replace it.
FROM_COMFYUI = ("torch", "torchvision")
HEADER = "# Written by `python -m tools.requirements` from pyproject.toml, without torch, which ComfyUI installs.\n"


def requirements() -> str:
    """The text of requirements.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [line for line in project["dependencies"] if re.split(r"[^\w.-]", line)[0] not in FROM_COMFYUI]
    return HEADER + "".join(f"{line}\n" for line in needed)


if __name__ == "__main__":
    (ROOT / "requirements.txt").write_text(requirements(), encoding="utf-8")
