"""Do checkpoints of true size load offline, exactly, and in how much time and memory?

Writes random weights of SD 2.1's (teacher) and SD-Turbo's (student) architecture as diffusers folders and as single
files, loads each in a process of its own, and compares every tensor with a hash taken before it was written. Then
writes and reads one adapter, and makes one picture. Prints a table and writes JSON; a failed check ends it with 1.

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
from .architecture_jobs import Hashes, adapt_and_sample, compare, convert, load, run_alone, write
from .machine import describe

# Counted by others on the published checkpoints. The single file's text encoder has OpenCLIP's unused parts as well.
PUBLISHED_NUMBERS = {
    "unet": 865_910_724,
    "text_encoder": 340_387_840,
    "vae": 83_653_863,
    "text_encoder_in_file": 354_032_641,
}
# 5 blocks of width 320, 5 of 640 and 6 of 1280; each has keys and values that read text 1024 wide.
KV_MATRICES, KV_NUMBERS = 32, 2 * 1024 * (5 * 320 + 5 * 640 + 6 * 1280)

# What is loaded: each checkpoint alone, and both as one family.
SELECTIONS: tuple[tuple[str, ...], ...] = (("teacher",), ("student",), ("teacher", "student"))


class Report:
    """What was measured and which checks it passed."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    def check(self, name: str, passed: bool, detail: object) -> None:
        """Record one check; detail says what was found."""
        self.checks.append({"name": name, "passed": bool(passed), "detail": detail})

    def same(self, name: str, truth: Hashes, found: Hashes) -> int:
        """Check that two sets of hashes are equal, and return the number of mismatches."""
        wrong = compare(truth, found)
        self.check(name, bool(truth) and not wrong, {"tensors": len(truth), "mismatches": wrong})
        return len(wrong)


def measure(base: Path, scale: str, dtype: str, report: Report) -> dict[str, Any]:
    """Everything, with at most four checkpoints on disk at a time, each deleted after its last use."""
    isolated = scale == "full"
    folders = {role: base / f"{role}-folder" for role in rc.ROLES}
    files = {role: base / f"{role}.safetensors" for role in rc.ROLES}
    expected = {role: imitated.prediction for role, imitated in rc.ROLES.items()}
    written = {
        role: run_alone(isolated, write, str(folders[role]), str(files[role]), role, scale, dtype) for role in rc.ROLES
    }
    truth: dict[str, Hashes] = {role: written[role]["hashes"] for role in rc.ROLES}
    if scale == "full":
        for role, result in written.items():
            report.check(
                f"{rc.ROLES[role].name} has as many parameters as the published checkpoint",
                result["numbers"] == PUBLISHED_NUMBERS,
                result["numbers"],
            )
    loads = []
    by_layout: dict[str, dict[tuple[str, ...], Hashes]] = {}
    for kind, paths in (("folder", folders), ("file", files)):
        by_layout[kind] = {}
        for roles in SELECTIONS:
            # Only at full size does a single file's norm bias say what the UNet predicts; a tiny one has to be told.
            told = kind == "file" and scale != "full"
            predictions = {role: expected[role] if told else "auto" for role in roles}
            result = run_alone(isolated, load, {role: str(paths[role]) for role in roles}, predictions)
            what = f"{' and '.join(rc.ROLES[role].name for role in roles)}, {kind}"
            found = by_layout[kind][roles] = result.pop("hashes")
            result["tensors"] = len(found)
            if not isolated:
                result["memory"] = {moment: dict.fromkeys(values) for moment, values in result["memory"].items()}
            result["mismatches"] = report.same(f"{what}: equal to what was written", _expected(truth, roles), found)
            right = {role: expected[role] for role in roles}
            report.check(f"{what}: prediction types", result["predictions"] == right, result["predictions"])
            layers = rc.SCALES[scale].text_encoder["num_hidden_layers"]
            report.check(f"{what}: text layers", result["text_layers"] == layers, result["text_layers"])
            report.check(f"{what}: no warnings", not result["warnings"], result["warnings"])
            size = sum(rc.folder_bytes(paths[role]) for role in roles)
            loads.append({"what": what, "bytes": size, "prediction_was_given": told, **result})
        if kind == "folder":
            for weights in base.glob("*-folder/*/*.safetensors"):
                weights.unlink()  # the configurations are wanted once more
    for roles, found in by_layout["folder"].items():
        names = " and ".join(rc.ROLES[role].name for role in roles)
        report.same(f"{names}: folder equal to file", found, by_layout["file"][roles])
    for role in rc.ROLES:
        converted = run_alone(isolated, convert, str(files[role]), str(folders[role]), dtype)
        report.same(f"{rc.ROLES[role].name}, file: diffusers' converter gives what was written", truth[role], converted)
    files["teacher"].unlink()
    used = run_alone(isolated, adapt_and_sample, str(files["student"]), str(base / "adapter.safetensors"))
    adapter, picture = used["adapter"], used["sample"]
    if not isolated:
        picture["memory"] = dict.fromkeys(picture["memory"])
    report.check("adapter reads back as it was written", not adapter["mismatches"], adapter["mismatches"])
    if scale == "full":
        counted = [adapter["matrices"], adapter["numbers"]]
        report.check("adapter holds all keys and values", counted == [KV_MATRICES, KV_NUMBERS], counted)
    sound = picture["shape"] == [1, 3, 64, 64] and picture["finite"] and picture["deviation"] > 0
    report.check("one-step sample is a finite picture", sound, picture["shape"])
    return {"numbers": {role: written[role]["numbers"] for role in rc.ROLES}, "loads": loads, **used}


def _expected(truth: Mapping[str, Hashes], roles: Sequence[str]) -> Hashes:
    """The truth under the names that `load` gives: UNets by role, text encoder and VAE once (both roles share them)."""
    result = {}
    for role in roles:
        for name, value in truth[role].items():
            result[f"{role}.{name}" if name.startswith("unet.") else name] = value
    return result


def table(found: Mapping[str, Any], report: Report) -> str:
    """The loads as a table, then one line each for what else was measured and for every failed check."""
    head = (
        f"{'loaded offline':<29} {'disk GB':>8} {'seconds':>8} {'peak GB':>8} {'/disk':>6} {'touched':>8} {'/disk':>6} "
        f"{'own MB':>7} {'tensors':>8} {'wrong':>6}  predicts"
    )
    lines = [head, "-" * len(head)]
    for row in found["loads"]:
        loaded, touched = row["memory"]["loaded"], row["memory"]["touched"]
        lines.append(
            f"{row['what']:<29} {row['bytes'] / 1e9:8.3f} {row['seconds']:8.2f} {_ratio(loaded['peak'], row['bytes'])} "
            f"{_ratio(touched['peak'], row['bytes'])} {_number(touched['anonymous'], 1e6, 7)} {row['tensors']:8d} "
            f"{row['mismatches']:6d}  {', '.join(row['predictions'].values())}"
        )
    adapter, picture = found["adapter"], found["sample"]
    numbers = found["numbers"]["student"]
    lines += [
        "",
        "parameters: " + ", ".join(f"{part} {count:,}" for part, count in numbers.items()),
        f"adapter: {adapter['matrices']} matrices, {adapter['numbers']:,} numbers, {adapter['bytes'] / 1e6:.1f} MB; "
        f"written in {adapter['write_seconds']:.2f} s, read in {adapter['read_seconds']:.2f} s",
        f"one step at 64x64 with the adapter on, fp32 on the CPU: {picture['seconds']:.2f} s (and "
        f"{picture['cast_to_fp32_seconds']:.2f} s to cast the weights), "
        f"peak {_number(picture['memory']['peak'], 1e9, 0)} GB",
        f"checks: {sum(c['passed'] for c in report.checks)} of {len(report.checks)} passed",
        *(f"FAILED: {c['name']}: {_brief(c['detail'])}" for c in report.checks if not c["passed"]),
    ]
    return "\n".join(lines)


def _number(value: int | None, unit: float, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value / unit:{width}.{2 if unit > 1e6 else 0}f}"


def _ratio(value: int | None, size: int) -> str:
    return f"{_number(value, 1e9, 8)} {'-' if value is None else f'{value / size:.2f}':>6}"


def _brief(detail: object) -> str:
    text = json.dumps(detail)
    return text if len(text) <= 300 else text[:300] + "…"


def check_space(folder: Path, scale: str, dtype: str) -> None:
    """Raise InputError unless all four checkpoints fit."""
    numbers = sum(t.numel() for tensors in rc.empty_networks(rc.SCALES[scale]).values() for t in tensors.values())
    # A tenth more for the text layer that is not used, configurations and vocabulary.
    needed = int(4.4 * numbers * rc.DTYPES[dtype].itemsize)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"folder {folder} has {free / 1e9:.1f} GB free; the four checkpoints need {needed / 1e9:.1f} GB: name "
            "another with --folder, or take --scale tiny."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 where every check passed, 1 where one failed, 2 where it could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_architecture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scale", choices=tuple(rc.SCALES), default="full", help="tiny is for tests")
    parser.add_argument("--dtype", choices=tuple(rc.DTYPES), default="fp16", help="of the checkpoints")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for the while (default: temporary)")
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
                found = measure(Path(base), options.scale, options.dtype, report)
            except InputError as error:
                # Not the user's to mend: the files are the benchmark's own, so this is a failed check.
                raise EchoDistillError(f"a checkpoint that was just written was refused: {error}") from error
        result = {
            "benchmark": "full_architecture",
            "date": date.today().isoformat(),
            "command": shlex.join(["python", "-m", "benchmarks.full_architecture", *given]),
            "machine": describe(),
            "settings": {
                "scale": options.scale,
                "dtype": options.dtype,
                "page_cache": "warm, as far as memory allows: the files were just written",
                "process_per_load": options.scale == "full",
            },
            "seconds": time.perf_counter() - started,
            **found,
            "checks": report.checks,
            "passed": all(check["passed"] for check in report.checks),
        }
        if options.out is not None:
            write_json(options.out, result)
    except EchoDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{result['command']}\n{result['date']}, {_one_line(result['machine'])}\n")
    print(table(found, report))
    return 0 if result["passed"] else 1


def _one_line(machine: Mapping[str, Any]) -> str:
    size = f", {machine['memory'] / 1e9:.0f} GB memory" if "memory" in machine else ""
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "diffusers", "transformers"))
    load = f", load average {machine['load_average_5_minutes']:.1f}" if "load_average_5_minutes" in machine else ""
    return f"{machine['cpu']}, {machine['cores']} cores{size}{load}, {libraries}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes to come, so that nothing could be fetched unnoticed
    sys.exit(main())
