"""A run whose process was killed at any moment of any write resumes and ends with the same bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import resume_worker
from resumed_runs import difference
from run_files import tree

import echodistill_core
from echodistill_core.training import run

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL, fork and limits")


def writing(file, nth=1):
    """The moments of writing one file whole: half of it, all of it under the temporary name, and in its place.

    A process that is killed before "open" or "sync" leaves the disk as it is before one of these.
    """
    return [["write", file, nth], ["rename", file, 1], ["sync folder", file, 1]]


def training(stage):
    """The moments of a stage's first two checkpoints, its log rewound between them, and its results."""
    log, checkpoint = f"{stage}/log.jsonl", f"{stage}/checkpoint.safetensors"
    return [
        ["append", log, 1],
        ["write", log, 1],
        ["append", log, 2],
        *writing(checkpoint, nth=80),
        *writing(log),
        ["append", log, 1],
        *writing(checkpoint),
        *writing(f"{stage}/teacher.safetensors", nth=2),
        *writing(f"{stage}/student.safetensors", nth=2),
        *writing("run.json"),
    ]


DISTIL_KILLS = [
    ["mkdir", ".", 1],
    *writing("run.json"),
    ["mkdir", "photographs", 1],
    *writing("photographs/000.png", nth=3),
    *writing("photographs/001.png"),
    ["mkdir", "distil", 1],
    *training("distil"),
]
ECHO_KILLS = [
    *writing("run.json"),
    ["mkdir", "echo/pool", 1],
    ["mkdir", "echo", 1],
    *writing("echo/pool/000.png", nth=3),
    *writing("echo/pool/001.png"),
    *writing("echo/pool/pool.json"),
    *training("echo"),
]
RANDOM = random.Random(2024)
TIMED_KILLS = [[RANDOM.uniform(0.02, 0.98)] for _ in range(6)] + [[RANDOM.uniform(0.2, 0.7) for _ in range(4)]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, reference):
    """The folders of runs whose processes resume_worker.py killed."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(reference.distil_folder, folder / "echo")
    jobs = [{"folder": "undisturbed", "kills": []}, {"folder": "distil", "kills": DISTIL_KILLS}]
    jobs.append({"folder": "echo", "kills": ECHO_KILLS})
    jobs += [{"folder": f"timed{i}", "kills": kills} for i, kills in enumerate(TIMED_KILLS)]
    for job in jobs:
        job["folder"] = str(folder / job["folder"])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    here = Path(echodistill_core.__file__).parents[1]
    worker = subprocess.run(
        [sys.executable, resume_worker.__file__, folder / "jobs.json", folder / "reports.json"],
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
    report = json.loads((folder / "reports.json").read_text())
    hits = {Path(job["folder"]).name: hit for job, hit in zip(jobs[1:], report["hits"], strict=True)}
    return SimpleNamespace(folder=folder, moments=report["undisturbed"], hits=hits)


@posix_only
@pytest.mark.slow
def test_a_process_of_its_own_makes_the_same_run(killed, reference):
    assert difference(tree(killed.folder / "undisturbed"), reference.echo) == []


@posix_only
@pytest.mark.slow
def test_every_kind_of_write_was_killed(killed):
    # Logs are rewritten only at a resume, to drop rows of iterations that it repeats.
    rewinding = {(op, f"{stage}/log.jsonl") for stage in run.STAGES for op in ("write", "rename", "sync folder")}
    planned = {(op, file) for op, file, _ in DISTIL_KILLS + ECHO_KILLS}
    happened = {tuple(moment) for moment in killed.moments}
    assert {(op, file) for op, file in happened if op not in ("open", "sync")} == planned - rewinding


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("distil", DISTIL_KILLS), ("echo", ECHO_KILLS)])
def test_killed_at_every_moment_of_every_write_it_ends_the_same(killed, reference, name, kills):
    assert [kill for kill, hit in zip(kills, killed.hits[name], strict=False) if not hit] == []
    assert killed.hits[name][-1] is False
    assert difference(tree(killed.folder / name), reference.echo) == []


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(TIMED_KILLS)))
def test_killed_at_any_time_it_ends_the_same(killed, reference, i):
    assert any(killed.hits[f"timed{i}"])
    assert difference(tree(killed.folder / f"timed{i}"), reference.echo) == []
