"""What `info` says of an adapter file or a run folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..adapter.file import Adapter
from ..training.run import STAGES, Run

MOST_SHOWN = 1000  # characters of one fact
MOST_LINES = 200  # of one mapping
_FIRST = ("placeholder", "class_noun", "role", "stage", "iterations", "seed", "family", "base_model", "base_prediction")


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """What is in an adapter file, by name; JSON values. What a person looks for comes first."""
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
    """What is in a run folder, by name; JSON values."""
    facts = {k: run.record[k] for k in ("fingerprint", "photographs", "finished", "echo", "sources", "settings")}
    facts["start_from"] = {role: str(path.relative_to(run.folder)) for role, path in run.start_paths.items()}
    facts["adapters"] = [
        str(p.relative_to(run.folder))
        for stage in STAGES
        for p in sorted(run.path(stage).glob("*.safetensors"))
        if p.name != "checkpoint.safetensors"
    ]
    return facts


def _from_json(text: str) -> Any:
    """The mapping that a text of metadata holds as JSON, or the text itself."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except (ValueError, RecursionError):
        return text


def lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as aligned lines; a mapping follows its name, indented."""
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
    """A text from a file with its control characters escaped, which a terminal would obey, and cut where it is long."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:MOST_SHOWN])
    return f"{shown}... ({len(text)} characters)" if len(text) > MOST_SHOWN else shown
