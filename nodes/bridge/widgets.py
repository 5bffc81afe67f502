"""Builds widgets from the core's settings, so that each default, range and description is written once."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

CATEGORY = "EchoDistill"  # of every node in ComfyUI's menu
AUTO = "auto"  # value of a combo that is not set
UNSET = -1  # value of a number that is not set; no setting is negative
LARGEST = 2**31 - 1


def schema(*, search_aliases: Sequence[str] = (), **options: Any) -> io.Schema:
    """A node's schema in the pack's category. search_aliases: search terms; older ComfyUI versions have none."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        options["search_aliases"] = list(search_aliases)
    return io.Schema(category=CATEGORY, **options)


def widget(cls: type, name: str, **options: Any) -> io.Input:
    """The widget of one setting, with the setting's default. options: overrides for the widget's arguments."""
    field = _fields(cls)[name]
    low, high = field.metadata["low"], field.metadata["high"]
    kind = _kinds(cls)[name]
    common = {"default": field.default, "tooltip": _reason(field), **options}
    if field.metadata["choices"]:
        return io.Combo.Input(name, options=list(field.metadata["choices"]), **common)
    if kind is bool:
        return io.Boolean.Input(name, **common)
    if kind is str:
        return io.String.Input(name, **common)
    if kind is int:
        common = {"min": int(low or 0), "max": int(high or LARGEST), **common}
        return io.Int.Input(name, **common)
    return io.Float.Input(name, **{"min": low, "max": high or 1000.0, "step": 0.01, **common})


@functools.cache
def advanced_widgets(cls: type, without: frozenset[str]) -> tuple[io.Input, ...]:
    """Advanced widgets for all settings except `without`. Unset ones take the value of preset and models.

    Cached, because ComfyUI asks for a node's schema several times for every prompt.
    """
    return tuple(_advanced(cls, name) for name in _fields(cls) if name not in without)


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user has set: `values` without the unset ones, with on and off as booleans."""
    booleans = {"on": True, "off": False}
    return {name: booleans.get(value, value) for name, value in values.items() if value not in (AUTO, UNSET)}


def advanced(given: io.Input) -> io.Input:
    """Mark an input as advanced: newer front ends collapse it, older ones always show it."""
    given.extra_dict["advanced"] = True
    return given


def _advanced(cls: type, name: str) -> io.Input:
    field = _fields(cls)[name]
    kind = _kinds(cls)[name]
    default: Any = ("on" if field.default else "off") if kind is bool else field.default
    if kind is bool or field.metadata["choices"]:
        options = [AUTO, *(field.metadata["choices"] or ("on", "off"))]
        tooltip = f"{_reason(field)} auto: the value of the preset or the family ({default} in the paper)."
        return advanced(io.Combo.Input(name, options=options, default=AUTO, tooltip=tooltip))
    tooltip = f"{_reason(field)} {UNSET}: the value of the preset or the family ({default:g} in the paper)."
    high = field.metadata["high"]
    if kind is int:
        high = int(high or LARGEST)
        return advanced(io.Int.Input(name, default=UNSET, min=UNSET, max=high, tooltip=tooltip))
    # Learning rates are millionths, weights hundredths.
    step = 1e-6 if 0 < default < 0.01 else 0.01
    return advanced(
        io.Float.Input(name, default=UNSET, min=UNSET, max=high or 1000.0, step=step, round=False, tooltip=tooltip)
    )


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _reason(field: dataclasses.Field[Any]) -> str:
    reason, unit = str(field.metadata["reason"]), field.metadata["unit"]
    return f"{reason[0].upper()}{reason[1:]}{f' ({unit})' if unit else ''}."
