"""The facts that `info` prints of an adapter file, a run folder or the environment."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapter.file import Adapter
from ..devices import computes_bf16
from ..training.events import current_names
from ..training.run import STAGES, Run

MOST_SHOWN = 1000  # characters of one fact
MOST_LINES = 200  # of one mapping
_FIRST = ("placeholder", "class_noun", "role", "stage", "iterations", "seed", "family", "base_model", "base_prediction")


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """Contents of an adapter file, by name; JSON values. The facts that users need most come first."""
    deltas = adapter.all_deltas()
    norms = {n: float(d.norm()) for n, d in deltas.items()}
    said = {k: _from_json(v) for k, v in adapter.metadata.items()}
    facts: dict[str, Any] = {"prompt_stub": f"photo of a {adapter.placeholder} {adapter.class_noun}"}
    facts |= {k: said.pop(k) for k in _FIRST if k in said}
    facts["weights"] = f"{len(deltas)} tensors, {sum(d.numel() for d in deltas.values())} numbers"
    facts["largest_change"] = max(norms, key=norms.__getitem__) if norms else "none"
    facts["token"] = f"{adapter.token_embeddings.shape[0]} row(s) of {adapter.token_embeddings.shape[1]} numbers"
    last = {k: said.pop(k, {}) for k in ("settings", "base_blocks")}
    return {**facts, **said, **last}


def run_facts(run: Run) -> dict[str, Any]:
    """Contents of a run folder, by name; JSON values."""
    facts = {k: run.record[k] for k in ("fingerprint", "photographs", "finished", "echo", "sources", "settings")}
    facts["finished"] = {
        stage: {**done, "losses": current_names(done.get("losses", {}))} for stage, done in facts["finished"].items()
    }
    facts["start_from"] = {role: str(path.relative_to(run.folder)) for role, path in run.start_paths.items()}
    facts["adapters"] = [
        str(p.relative_to(run.folder))
        for stage in STAGES
        for p in sorted(run.path(stage).glob("*.safetensors"))
        if p.name != "checkpoint.safetensors"
    ]
    return facts


# Distributions whose versions explain most differences between two machines.
_PACKAGES = (
    *("torchvision", "diffusers", "transformers", "safetensors", "open_clip_torch", "huggingface_hub", "numpy"),
    *("Pillow", "matplotlib", "peft", "accelerate", "tensorboard"),
)


def environment_facts() -> dict[str, Any]:
    """Versions, devices and ComfyUI, by name; JSON values without paths or user names, fit for a bug report."""
    return {
        "echodistill": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "comfyui": _comfyui_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "devices": _devices(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _devices() -> dict[str, str]:
    """Each device that torch can use, with its name, memory and support for bf16."""
    cpu = torch.device("cpu")
    found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {_bf16(cpu)}"}
    for i in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", i), torch.cuda.get_device_properties(i)
        found[str(device)] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, {_bf16(device)}"
    if torch.backends.mps.is_available():
        found["mps"] = _bf16(torch.device("mps"))
    return found


def _bf16(device: torch.device) -> str:
    return "bf16" if computes_bf16(device) else "no bf16"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _comfyui_version() -> str:
    """The version of the ComfyUI whose custom_nodes folder holds this package, from its comfyui_version.py."""
    # Not resolved: a pack under development is often a symbolic link in custom_nodes.
    for folder in Path(__file__).absolute().parents:
        if folder.name == "custom_nodes":
            file = folder.parent / "comfyui_version.py"
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
            return match[1] if match else "unknown version"
    return "not installed in ComfyUI's custom_nodes"


def _from_json(text: str) -> Any:
    """A metadata text parsed as a JSON object, or the text itself where it is none."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except (ValueError, RecursionError):
        return text


def lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as aligned lines. The lines of a nested mapping follow its name, indented."""
    width = min(max((len(name) for name in facts), default=0), 40)
    shown = dict(itertools.islice(facts.items(), MOST_LINES))
    for name, value in shown.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_printable(name)}"
            yield from lines(value, indent + "  ")
        else:
            yield f"{indent}{_printable(name):<{width}}  {_brief(value)}".rstrip()
    if len(facts) > len(shown):
        yield f"{indent}... and {len(facts) - len(shown)} more"


def _brief(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_brief, value)) or "none"
    return "none" if value is None or value == {} else _printable(str(value))


def _printable(text: str) -> str:
    """A text from a file, cut to MOST_SHOWN characters, with control characters escaped for the terminal."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:MOST_SHOWN])
    return f"{shown}... ({len(text)} characters)" if len(text) > MOST_SHOWN else shown
