"""Loading of full-size checkpoints, offline: correctness of every tensor, time and memory.

It writes random weights with the architectures of SD 2.1 (teacher) and SD-Turbo (student) as diffusers folders and as
single files, loads each in its own process, and compares every tensor with a hash computed before writing. It then
writes and reads an adapter and samples one image. The exit status is 1 if a check fails.

    python -m benchmarks.full_architecture [--scale full|tiny] [--out FILE.json] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from echodistill_core.errors import EchoDistillError, InputError
from echodistill_core.files import write_json

from . import random_checkpoint as rc
from .architecture_jobs import Hashes, adapt_and_sample, compare, convert, load, run_isolated, write
from .machine import describe
from .measure import table

# Parameters of the published checkpoints, as reported by others. A single file's text encoder includes unused layers.
PUBLISHED_NUMBERS = {
    "unet": 865_910_724,
    "text_encoder": 340_387_840,
    "vae": 83_653_863,
    "text_encoder_in_file": 354_032_641,
}
# 5 blocks of width 320, 5 of 640 and 6 of 1280; each has key and value matrices for text features of width 1024.
KV_MATRICES, KV_NUMBERS = 32, 2 * 1024 * (5 * 320 + 5 * 640 + 6 * 1280)

# Each checkpoint is loaded separately, and both as one family.
SELECTIONS: tuple[tuple[str, ...], ...] = (("teacher",), ("student",), ("teacher", "student"))


class Report:
    """The checks and their results."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    def check(self, name: str, passed: bool, detail: object) -> None:
        """Record one check. detail: the value that was checked."""
        self.checks.append({"name": name, "passed": bool(passed), "detail": detail})

    def check_equal(self, name: str, expected: Hashes, actual: Hashes) -> int:
        """Check that two sets of hashes are equal. Returns the number of mismatches."""
        mismatches = compare(expected, actual)
        self.check(name, bool(expected) and not mismatches, {"tensors": len(expected), "mismatches": mismatches})
        return len(mismatches)


def measure(base: Path, scale: str, dtype: str, report: Report) -> dict[str, Any]:
    """Run all jobs and checks in the folder `base`. Files are deleted after their last use."""
    isolated = scale == "full"
    folders = {role: base / f"{role}-folder" for role in rc.ROLES}
    files = {role: base / f"{role}.safetensors" for role in rc.ROLES}
    written = {
        role: run_isolated(isolated, write, str(folders[role]), str(files[role]), role, scale, dtype)
        for role in rc.ROLES
    }
    truth: dict[str, Hashes] = {role: written[role]["hashes"] for role in rc.ROLES}
    if isolated:
        for role, result in written.items():
            report.check(
                f"{rc.ROLES[role].name} has as many parameters as the published checkpoint",
                result["numbers"] == PUBLISHED_NUMBERS,
                result["numbers"],
            )
    loads, hashes = [], {}
    for layout, paths in (("folder", folders), ("file", files)):
        for roles in SELECTIONS:
            row, hashes[layout, roles] = _load(layout, {role: paths[role] for role in roles}, scale, truth, report)
            loads.append(row)
        if layout == "folder":
            for weights in base.glob("*-folder/*/*.safetensors"):
                weights.unlink()  # the configurations are needed by `convert`
    for roles in SELECTIONS:
        report.check_equal(f"{_names(roles)}: folder equal to file", hashes["folder", roles], hashes["file", roles])
    for role in rc.ROLES:
        converted = run_isolated(isolated, convert, str(files[role]), str(folders[role]), dtype)
        name = f"{rc.ROLES[role].name}, file: diffusers' converter gives what was written"
        report.check_equal(name, truth[role], converted)
    files["teacher"].unlink()
    used = run_isolated(isolated, adapt_and_sample, str(files["student"]), str(base / "adapter.safetensors"))
    _check_adapter_and_sample(used, scale, report)
    return {"numbers": {role: written[role]["numbers"] for role in rc.ROLES}, "loads": loads, **used}


def _load(
    layout: str, paths: Mapping[str, Path], scale: str, truth: Mapping[str, Hashes], report: Report
) -> tuple[dict[str, Any], Hashes]:
    """Load the checkpoints of these roles and check the result. Returns a row of figures, and the hashes."""
    isolated, roles = scale == "full", tuple(paths)
    expected = {role: rc.ROLES[role].prediction for role in roles}
    # A tiny UNet lacks the norm bias by which the loader recognises the prediction type of a single file.
    given = layout == "file" and scale != "full"
    predictions = {role: expected[role] if given else "auto" for role in roles}
    result = run_isolated(isolated, load, {role: str(path) for role, path in paths.items()}, predictions)
    name = f"{_names(roles)}, {layout}"
    hashes: Hashes = result.pop("hashes")
    if not isolated:  # the memory of this process is not that of the job
        result["memory"] = {moment: dict.fromkeys(values) for moment, values in result["memory"].items()}
    mismatches = report.check_equal(f"{name}: equal to what was written", _expected(truth, roles), hashes)
    report.check(f"{name}: prediction types", result["predictions"] == expected, result["predictions"])
    layers = rc.SCALES[scale].text_encoder["num_hidden_layers"]
    report.check(f"{name}: text layers", result["text_layers"] == layers, result["text_layers"])
    report.check(f"{name}: no warnings", not result["warnings"], result["warnings"])
    row = {
        "what": name,
        "bytes": sum(rc.folder_bytes(path) for path in paths.values()),
        "prediction_was_given": given,
        **result,
        "tensors": len(hashes),
        "mismatches": mismatches,
    }
    return row, hashes


def _check_adapter_and_sample(used: dict[str, Any], scale: str, report: Report) -> None:
    adapter, image = used["adapter"], used["sample"]
    report.check("adapter reads back as it was written", not adapter["mismatches"], adapter["mismatches"])
    if scale == "full":
        size = [adapter["matrices"], adapter["numbers"]]
        report.check("adapter holds all keys and values", size == [KV_MATRICES, KV_NUMBERS], size)
    else:
        image["memory"] = dict.fromkeys(image["memory"])
    valid = image["shape"] == [1, 3, 64, 64] and image["finite"] and image["deviation"] > 0
    report.check("one-step sample is a finite picture", valid, image["shape"])


def _names(roles: Sequence[str]) -> str:
    return " and ".join(rc.ROLES[role].name for role in roles)


def _expected(truth: Mapping[str, Hashes], roles: Sequence[str]) -> Hashes:
    """The written hashes under the names that `load` returns: each role's UNet, and the shared text encoder and VAE."""
    result = {}
    for role in roles:
        for name, value in truth[role].items():
            result[f"{role}.{name}" if name.startswith("unet.") else name] = value
    return result


def summary(figures: Mapping[str, Any], report: Report) -> str:
    """A table of the loads, and a line for each other figure and each failed check."""
    header = [
        *("loaded offline", "disk GB", "seconds", "peak GB", "/disk", "touched", "/disk", "anonymous MB", "tensors"),
        *("mismatches", "prediction"),
    ]
    rows = []
    for row in figures["loads"]:
        loaded, touched = row["memory"]["loaded"], row["memory"]["touched"]
        rows.append(
            [
                row["what"],
                f"{row['bytes'] / 1e9:.3f}",
                f"{row['seconds']:.2f}",
                *(_gigabytes(loaded["peak"]), _ratio(loaded["peak"], row["bytes"])),
                *(_gigabytes(touched["peak"]), _ratio(touched["peak"], row["bytes"])),
                "-" if touched["anonymous"] is None else f"{touched['anonymous'] / 1e6:.0f}",
                row["tensors"],
                row["mismatches"],
                ", ".join(row["predictions"].values()),
            ]
        )
    adapter, image = figures["adapter"], figures["sample"]
    numbers = figures["numbers"]["student"]
    lines = [
        table(header, rows),
        "peak: while loading; touched: after every tensor was read; anonymous: memory that no file backs",
        "",
        "parameters: " + ", ".join(f"{network} {count:,}" for network, count in numbers.items()),
        f"adapter: {adapter['matrices']} matrices, {adapter['numbers']:,} numbers, {adapter['bytes'] / 1e6:.1f} MB; "
        f"written in {adapter['write_seconds']:.2f} s, read in {adapter['read_seconds']:.2f} s",
        f"one step at 64x64 with the adapter, fp32 on the CPU: {image['seconds']:.2f} s (and "
        f"{image['cast_to_fp32_seconds']:.2f} s to cast the weights), peak {_gigabytes(image['memory']['peak'])} GB",
        f"checks: {sum(c['passed'] for c in report.checks)} of {len(report.checks)} passed",
        *(f"FAILED: {c['name']}: {_shortened(c['detail'])}" for c in report.checks if not c["passed"]),
    ]
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f}"


def _ratio(size: int | None, total: int) -> str:
    return "-" if size is None else f"{size / total:.2f}"


def _shortened(detail: object) -> str:
    text = json.dumps(detail)
    return text if len(text) <= 300 else text[:300] + "…"


def check_space(folder: Path, scale: str, dtype: str) -> None:
    """Raise InputError unless the disk of this folder has space for all four checkpoints."""
    numbers = sum(t.numel() for tensors in rc.empty_networks(rc.SCALES[scale]).values() for t in tensors.values())
    # A tenth more: the unused text layer, configurations and vocabulary.
    needed = int(4.4 * numbers * rc.DTYPES[dtype].itemsize)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"folder {folder} has {free / 1e9:.1f} GB free; the four checkpoints need {needed / 1e9:.1f} GB: choose "
            "another folder with --folder, or use --scale tiny."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if every check passed, 1 if one failed, 2 if the benchmark could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_architecture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--scale", choices=tuple(rc.SCALES), default="full", help="size of the checkpoints; tiny is for tests"
    )
    parser.add_argument("--dtype", choices=tuple(rc.DTYPES), default="fp16", help="of the checkpoints")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--folder", type=Path, help="folder for the temporary checkpoints (default: the system's)")
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    report = Report()
    started = time.perf_counter()
    try:
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="echodistill-", dir=options.folder) as base:
            check_space(Path(base), options.scale, options.dtype)
            try:
                figures = measure(Path(base), options.scale, options.dtype, report)
            except InputError as error:
                # The benchmark wrote the file itself, so the user cannot correct it: a failed check, not bad input.
                raise EchoDistillError(f"a checkpoint that was just written was refused: {error}") from error
        result = {
            "benchmark": "full_architecture",
            "date": date.today().isoformat(),
            "command": shlex.join(["python", "-m", "benchmarks.full_architecture", *given]),
            "machine": describe(),
            "settings": {
                "scale": options.scale,
                "dtype": options.dtype,
                "page_cache": "warm as far as memory allows, since the files were just written",
                "process_per_load": options.scale == "full",
            },
            "seconds": time.perf_counter() - started,
            **figures,
            "checks": report.checks,
            "passed": all(check["passed"] for check in report.checks),
        }
        if options.out is not None:
            write_json(options.out, result)
    except EchoDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{result['command']}\n{result['date']}, {_one_line(result['machine'])}\n")
    print(summary(figures, report))
    return 0 if result["passed"] else 1


def _one_line(machine: Mapping[str, Any]) -> str:
    size = f", {machine['memory'] / 1e9:.0f} GB memory" if "memory" in machine else ""
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "diffusers", "transformers"))
    load = f", load average {machine['load_average_5_minutes']:.1f}" if "load_average_5_minutes" in machine else ""
    return f"{machine['cpu']}, {machine['cores']} cores{size}{load}, {libraries}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the jobs, so that a download would fail
    sys.exit(main())
