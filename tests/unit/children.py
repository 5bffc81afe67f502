"""Child processes of tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import echodistill_core

PACKAGE_PARENT = Path(echodistill_core.__file__).parents[1]
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def run_child(code, *arguments, **environment):
    """Run Python code in a process of its own, beside the package; the environment is extended by the keywords."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=PACKAGE_PARENT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
