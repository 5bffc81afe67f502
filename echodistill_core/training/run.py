"""A run on disk: one folder, named by a fingerprint of what determines its result, and never silently overwritten.

run.json                    identity, settings, sources, stages
photographs/000.png ...     the photographs as training sees them
distil/, echo/              a folder for each stage:
    checkpoint.safetensors  where it resumes, and what the next stage carries on from
    student.safetensors     its adapters, written when it is finished
    teacher.safetensors
    log.jsonl, losses.png, samples/step_000100.png
echo/pool/                  the images that the student made for the echoing stage
prior/student/, teacher/    where prior_weight is on, the images of the class that each made before it learned
start/student.safetensors   where the run began from adapters, those (and teacher.safetensors)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..concept.images import ImageSet
from ..errors import DamagedRunError, InputError
from ..files import append_line, remove_leftovers, write_json, write_text
from ..models.family import Family
from ..models.sources import ModelSources
from ..settings import EchoSettings, TrainSettings, affecting_result, from_options
from ..tensorfile import read_header
from .events import current_names
from .identity import (
    as_known_to,
    differences,
    family_identity,
    file_fingerprint,
    fingerprint_of,
    inputs_identity,
)
from .pngs import read_pngs

FORMAT_VERSION = 1
STAGES = ("distil", "echo")
CHECKPOINT = "checkpoint.safetensors"  # its name in a stage's folder
RECORD = ("fingerprint", "identity", "settings", "sources", "photographs", "echo", "finished")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("identity", "settings", "sources", "finished", "backbones"), dict),
    "photographs": list,
    "fingerprint": str,
}
# Settings of earlier runs that are no more: a way to save memory, as memory_mode is now, that changed no result.
_GONE = ("gradient_checkpointing",)


@dataclass
class Run:
    """An open run folder. `record` is what run.json holds."""

    folder: Path
    record: dict[str, Any]

    @property
    def settings(self) -> TrainSettings:
        """The settings of its distillation stage: all as they are recorded, whatever presets and families say today."""
        recorded = {n: v for n, v in self.record["settings"].items() if n not in _GONE}
        return from_options(TrainSettings, {**dataclasses.asdict(TrainSettings()), **recorded})

    @property
    def sources(self) -> ModelSources:
        """Where its models came from."""
        return from_options(ModelSources, self.record["sources"])

    @property
    def resolution(self) -> int:
        """Side of its training images in pixels."""
        return int(self.record["identity"]["resolution"])

    def fingerprint(self, stage: str) -> str:
        """Of everything that determines this stage's result; the echoing stage's depends on the first's."""
        distil = str(self.record["fingerprint"])
        return distil if stage == "distil" else _echo_fingerprint(distil, self.record["echo"])

    def echo_fingerprint(self, echo: EchoSettings) -> str:
        """Of an echoing stage with these settings, begun or not."""
        return _echo_fingerprint(self.fingerprint("distil"), affecting_result(echo))

    def path(self, stage: str, *parts: str) -> Path:
        """A path inside a stage's folder."""
        return self.folder.joinpath(stage, *parts)

    def is_finished(self, stage: str) -> bool:
        """Whether the stage is recorded as finished and its adapters are there."""
        figures = self.record["finished"].get(stage)
        return figures is not None and all(self.path(stage, f"{r}.safetensors").is_file() for r in figures["roles"])

    def finish(self, stage: str, figures: Mapping[str, Any]) -> None:
        """Record that the stage's results are all on disk."""
        self.record["finished"] = {**self.record["finished"], stage: dict(figures)}
        self.save()

    def remove_leftovers(self) -> None:
        """Delete what a killed process left half-written. For the process that goes on with the run, not for readers:
        another one may be training and writing such a file right now.
        """
        for place in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            remove_leftovers(place)

    def save(self) -> None:
        """Write run.json atomically."""
        write_json(self.folder / "run.json", self.record)

    def check_inputs(self, settings: TrainSettings, images: ImageSet) -> None:
        """Raise InputError, naming what differs, where its settings or photographs are others."""
        there = self.record["identity"]
        here = as_known_to(there, inputs_identity(settings, images))
        known = {name: there[name] for name in here if name in there}
        if known != here:
            raise another_run(self.folder, known, here)

    def check_family(self, family: Family) -> None:
        """Raise InputError where these are not the models that the run was trained on."""
        here = as_known_to(self.record["identity"], family_identity(family))
        there = {name: self.record["identity"][name] for name in here}
        if there != here:
            raise InputError(
                f"the run {self.folder} was trained on other models: {differences(there, here)}; give it back its own."
            )

    def check_backbones(self, found: Mapping[str, str]) -> None:
        """Record the fingerprints of the frozen backbones, by role, or compare them with those it was begun with.

        Raises InputError where they are others: their features decide what a run learns. Runs of earlier versions do
        not hold them.
        """
        there = self.record.get("backbones")
        if there is None:
            self.record["backbones"] = dict(found)
            self.save()
            return
        differing = [role for role in found if there.get(role, found[role]) != found[role]]
        if differing:
            raise InputError(
                f"the run {self.folder} was begun with other files of the backbones {', '.join(differing)}; give it "
                "back its own, or move that folder away and train anew."
            )

    @property
    def begun_echo(self) -> dict[str, Any] | None:
        """The settings that its echoing stage was begun with, or None. Without its folder nothing is left of it,
        whatever the record says.
        """
        return self.record["echo"] if self.path("echo").is_dir() else None

    def check_echo(self, echo: EchoSettings) -> None:
        """Raise InputError, naming what differs, where an echoing stage was begun with other settings."""
        begun, asked = self.begun_echo, affecting_result(echo)
        if begun is not None and begun != asked:
            raise InputError(
                f"the run {self.folder} has an echoing stage of other settings: {differences(begun, asked)}; "
                "use those again, or echo a copy of the folder without its echo subfolder."
            )

    def declare_echo(self, echo: EchoSettings) -> None:
        """Record the echoing stage's settings, or check them against those it was begun with.

        Raises InputError where the distillation stage is not finished, or a begun echo has other settings.
        """
        if not self.is_finished("distil"):
            raise InputError(
                f"the run {self.folder} is not trained to its end; run the same train command again first."
            )
        self.check_echo(echo)
        there = checkpoint_fingerprint(self.path("echo", CHECKPOINT))
        if self.begun_echo is None and there not in ("", self.echo_fingerprint(echo)):
            raise InputError(
                f"the run {self.folder} has an echoing stage that was begun with other settings, which its record does "
                f"not hold any more; use those again, or move {self.path('echo')} away."
            )
        self.remove_leftovers()
        if self.begun_echo is None:
            self.record["echo"] = affecting_result(echo)
            self.record["finished"] = {s: figures for s, figures in self.record["finished"].items() if s != "echo"}
            self.save()

    def log(self, stage: str, rows: tuple[Mapping[str, float], ...]) -> None:
        """Append losses to the stage's log."""
        append_line(self.path(stage, "log.jsonl"), "\n".join(json.dumps(row) for row in rows))

    def read_log(self, stage: str) -> list[dict[str, float]]:
        """The logged losses, one row an iteration, under today's names. Incomplete lines are skipped."""
        path = self.path(stage, "log.jsonl")
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        whole, _, _ = text.rpartition("\n")
        return [row for line in whole.split("\n") if (row := _log_row(line)) is not None]

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop log rows after `step`, which a resumed run will do again."""
        rows = [row for row in self.read_log(stage) if row["step"] <= step]
        if self.path(stage, "log.jsonl").is_file():
            write_text(self.path(stage, "log.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))

    @property
    def start_paths(self) -> dict[str, Path]:
        """Where it keeps the adapter files that its roles began from, by role; empty where it began at the base."""
        roles = [role for role in ("teacher", "student") if f"start_{role}" in self.record["identity"]]
        return {role: self.folder / "start" / f"{role}.safetensors" for role in roles}

    def start_files(self) -> dict[str, Path]:
        """The adapter files that its roles began from, by role. Raises InputError where one was changed or removed."""
        for role, path in self.start_paths.items():
            if file_fingerprint(path) != self.record["identity"][f"start_{role}"]:
                raise InputError(f"{path} was changed since training; give the run back the file that it began from.")
        return self.start_paths

    def photographs(self) -> ImageSet:
        """The photographs as training saw them. Raises InputError where they were changed or removed."""
        names = tuple(self.record["photographs"])
        pixels = read_pngs(self.folder / "photographs", len(names))
        images = ImageSet(pixels, names)
        if images.fingerprint != self.record["identity"]["photographs"]:
            raise InputError(
                f"{self.folder / 'photographs'} was changed since training; give the run back its own pictures."
            )
        return images


def _log_row(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line.strip("\0 "))
    except ValueError:
        return None
    return current_names(row) if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def checkpoint_fingerprint(path: Path) -> str:
    """The fingerprint of the run that a checkpoint file belongs to; "" where there is no sound checkpoint."""
    try:
        return read_header(path).metadata.get("fingerprint", "")
    except InputError:
        return ""


def _echo_fingerprint(distil: str, echo: Mapping[str, Any]) -> str:
    return fingerprint_of({"distil": distil, **echo})


def open_run(folder: str | Path) -> Run:
    """Open an existing run folder.

    Raises InputError where it is none or of another version, and DamagedRunError, which says what can be saved, where
    run.json is empty, no JSON, or lacks a part.
    """
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(f"{folder} is no run folder: it has no run.json; expected a folder written by train.")
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text) if text.strip("\0 \r\n\t") else None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its disk and permissions.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"is no JSON ({error})") from error
    if record is None:
        raise _damaged(folder, f"is empty ({path.stat().st_size} bytes)")
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}.")
    absent = [key for key in ("format_version", *RECORD) if not isinstance(record, dict) or key not in record]
    if absent:
        raise _damaged(folder, f"lacks {', '.join(absent)}")
    wrong = [key for key, kind in _KINDS.items() if not isinstance(record.get(key, kind()), kind)]
    if wrong:
        raise _damaged(folder, f"holds something else than a {_KINDS[wrong[0]].__name__} under {wrong[0]}")
    return Run(folder, record)


def _damaged(folder: Path, how: str) -> DamagedRunError:
    files = [folder / stage / f"{role}.safetensors" for stage in reversed(STAGES) for role in ("student", "teacher")]
    adapters = [path for path in files if path.is_file()]
    kept = f"its adapters still work alone (echodistill sample --adapter {adapters[0]}), and " if adapters else ""
    return DamagedRunError(
        f"{folder / 'run.json'} {how}: it was changed by hand or damaged; {kept}the train command that made the run, "
        f"with --out {folder}, writes it anew and goes on from the last checkpoint."
    )


def another_run(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> InputError:
    """The error for a folder that holds a run of another identity, with what differs."""
    return InputError(
        f"out folder {folder} holds another run: {differences(there, here)}; "
        "choose another folder, or the same settings and photographs to go on with it."
    )
