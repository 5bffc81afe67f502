"""Contact sheets of a bench: one picture file for each table, with a row for each method and a column for each concept.

A result's "picture" is a path in the bench's folder. It may end in a media fragment, "#xywh=left,top,width,height" in
pixels (W3C Media Fragments URI 1.0, section 4.2.2), which selects one tile of a sheet.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..reporting import save_picture
from .summary import summarise

FOLDER = "pictures"
_FRAGMENT = re.compile(r"#xywh=(\d+),(\d+),(\d+),(\d+)$")
# Tiles start at multiples of WebP's block size, so that re-encoding a sheet hardly changes its tiles.
_BLOCK = 16
_LABEL_WIDTH, _HEADING, _FONT_SIZE = 224, 32, 15

_Key = tuple[str, str]  # method, concept


def open_picture(folder: Path, address: str) -> Image.Image:
    """The picture, or the tile of a sheet, at a result's address. Raises OSError where it cannot be read."""
    fragment = _FRAGMENT.search(address)
    with Image.open(folder / _FRAGMENT.sub("", address)) as picture:
        if fragment is None:
            return picture.copy()
        left, top, width, height = map(int, fragment.groups())
        if left + width > picture.width or top + height > picture.height:
            raise OSError(f"{address} is outside of the picture of {picture.width}×{picture.height} pixels")
        return picture.crop((left, top, left + width, top + height))


def write_sheets(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Write folder/pictures/<table>.webp for every table with pictures; returns the rows with addresses in the sheets.

    rows: results of a bench, as `report.write_report` takes them. A tile shows the first training seed of its method
    and concept. The address of a picture that cannot be read stays as it is. A sheet whose tiles are all in place
    already is not written again. Raises InputError for malformed rows and StorageError where a file cannot be written.
    """
    summary = summarise(rows, {})
    shown: dict[_Key, str] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row.get("picture"):
            shown.setdefault((row["method"], row["concept"]), row["picture"])
    tiles = {}
    for key, address in shown.items():
        with contextlib.suppress(OSError):
            tiles[key] = open_picture(folder, address).convert("RGB")
    addresses: dict[_Key, str] = {}
    for section in summary.sections:
        methods = {row.method: row.title for row in section.rows if any(method == row.method for method, _ in tiles)}
        concepts = [concept for concept in summary.concepts if any((method, concept) in tiles for method in methods)]
        places = _places(list(methods), concepts, tiles)
        path = f"{FOLDER}/{section.table.key}.webp"
        for key, (left, top) in places.items():
            # A method of several tables has its address in the first one's sheet.
            addresses.setdefault(key, f"{path}#xywh={left},{top},{tiles[key].width},{tiles[key].height}")
        if places and (any(shown[k] != addresses[k] for k in places) or not (folder / path).is_file()):
            save_picture(folder / path, _sheet(methods, concepts, {places[key]: tiles[key] for key in places}))
    return [_readdressed(row, shown, addresses) for row in rows]


def _readdressed(row: Mapping[str, Any], shown: Mapping[_Key, str], addresses: Mapping[_Key, str]) -> dict[str, Any]:
    key, address = (row["method"], row["concept"]), row.get("picture") or ""
    if not address or key not in addresses:
        return dict(row)
    # Only the first seed is on the sheets; the sheet that another seed's address refers to may have been overwritten.
    return {**row, "picture": addresses[key] if address == shown[key] else ""}


def _places(
    methods: Sequence[str], concepts: Sequence[str], tiles: Mapping[_Key, Image.Image]
) -> dict[_Key, tuple[int, int]]:
    """(method, concept) -> left and top of its tile in pixels; all rows and columns have the largest tile's size."""
    sizes = [tile.size for (method, _), tile in tiles.items() if method in methods]
    if not sizes:
        return {}
    width, height = (-(-max(side) // _BLOCK) * _BLOCK for side in zip(*sizes, strict=True))
    return {
        (method, concept): (_LABEL_WIDTH + x * width, _HEADING + y * height)
        for y, method in enumerate(methods)
        for x, concept in enumerate(concepts)
        if (method, concept) in tiles
    }


def _sheet(
    methods: Mapping[str, str], concepts: Sequence[str], placed: Mapping[tuple[int, int], Image.Image]
) -> Image.Image:
    """The tiles at their places, with the methods' titles at the left and the concepts' names on top."""
    lefts, tops = (sorted({place[axis] for place in placed}) for axis in (0, 1))
    right, bottom = (max(place[axis] + tile.size[axis] for place, tile in placed.items()) for axis in (0, 1))
    sheet = Image.new("RGB", (right, bottom), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for left, concept in zip(lefts, concepts, strict=True):
        draw.text((left + 4, 8), concept, "black", font)
    for top, title in zip(tops, methods.values(), strict=True):
        draw.multiline_text((6, top + 4), textwrap.fill(title, 28), "black", font, spacing=2)
    for place, tile in placed.items():
        sheet.paste(tile, place)
    return sheet
