"""Contact sheets of a bench: every sample is on a sheet, and a sheet alone keeps it through later reports."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from echodistill_core.evaluation import bench, paper
from echodistill_core.evaluation.methods import METHODS
from echodistill_core.evaluation.sheets import open_picture, write_sheets

COLOURS = {"echodistill": (200, 30, 30), "lora": (30, 160, 60), "no-clip": (40, 60, 200)}
CONCEPTS = ("mug", "cat")


def row(method, concept, seed=0, picture=""):
    return {
        "training": method,
        "method": method,
        "title": method,
        "concept": concept,
        "seed": seed,
        "iterations": 3,
        "role": "student",
        "steps": 1,
        "diverged": False,
        "seconds": 1.23456,
        "metrics": {"dino": 0.123456789},
        "picture": picture,
    }


def rows_with_pictures(folder, methods=tuple(COLOURS)):
    """One row and one picture for each method and concept; a concept's brightness tells it apart."""
    rows = []
    for method in methods:
        for index, concept in enumerate(CONCEPTS):
            path = f"cells/{method}-{concept}.webp"
            (folder / "cells").mkdir(exist_ok=True)
            colour = tuple(c - 25 * index for c in COLOURS[method])
            Image.new("RGB", (50, 20), colour).save(folder / path, lossless=True)
            rows.append(row(method, concept, picture=path))
    return rows


def check(rows, folder):
    for one in rows:
        tile = open_picture(folder, one["picture"])
        wanted = np.array(COLOURS[one["method"]]) - 25 * CONCEPTS.index(one["concept"])
        assert tile.size == (50, 20)
        # Without the edges, which lossy compression blends with the white around them.
        inside = np.asarray(tile.convert("RGB"), dtype=int)[4:-4, 4:-4]
        assert abs(inside - wanted).max() < 12, one


def test_every_picture_is_on_the_sheet_of_each_of_its_tables(tmp_path):
    rows = write_sheets(rows_with_pictures(tmp_path), tmp_path)
    check(rows, tmp_path)
    # EchoDistill and LoRA share table 1; table 8 has EchoDistill again, for comparison.
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"1.webp", "8.webp"}
    files = {one["method"]: one["picture"].partition("#")[0] for one in rows}
    assert files == {"echodistill": "pictures/1.webp", "lora": "pictures/1.webp", "no-clip": "pictures/8.webp"}
    corners = [tuple(map(int, re.findall(r"\d+", one["picture"].partition("#")[2])[:2])) for one in rows[:4]]
    assert corners[0][1] == corners[1][1] < corners[2][1]  # a row for each method
    assert corners[0][0] == corners[2][0] < corners[1][0]  # a column for each concept
    with Image.open(tmp_path / "pictures" / "8.webp") as sheet:
        left, top = corners[0]
        assert abs(np.array(sheet.convert("RGB").getpixel((left + 10, top + 10))) - COLOURS["echodistill"]).max() < 12
        # Labels beside and above the tiles.
        assert np.asarray(sheet.convert("L"))[top : top + 20, :left].min() < 128
        assert np.asarray(sheet.convert("L"))[:top, left : left + 50].min() < 128


def test_sheets_alone_keep_the_pictures(tmp_path):
    rows = write_sheets(rows_with_pictures(tmp_path), tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    files = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert write_sheets(rows, tmp_path) == rows
    assert {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == files


def test_a_new_method_joins_the_sheet_and_moves_the_others(tmp_path):
    first = write_sheets(rows_with_pictures(tmp_path, ("lora",)), tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    rows = write_sheets([*first, *rows_with_pictures(tmp_path, ("echodistill", "no-clip"))], tmp_path)
    check(rows, tmp_path)
    assert rows[0]["picture"] != first[0]["picture"]


def test_a_new_picture_of_a_method_is_renewed_on_every_sheet(tmp_path):
    rows = write_sheets(rows_with_pictures(tmp_path), tmp_path)
    Image.new("RGB", (50, 20), "white").save(tmp_path / "cells" / "again.webp")
    rows[0]["picture"] = "cells/again.webp"
    old = [np.asarray(Image.open(tmp_path / "pictures" / name)) for name in ("1.webp", "8.webp")]
    write_sheets(rows, tmp_path)
    new = [np.asarray(Image.open(tmp_path / "pictures" / name)) for name in ("1.webp", "8.webp")]
    assert all(abs(a.astype(int) - b).max() > 50 for a, b in zip(old, new, strict=True))


def test_only_the_first_seed_is_shown_and_missing_pictures_stay_named(tmp_path):
    rows = rows_with_pictures(tmp_path, ("lora",))
    rows += [row("lora", "mug", 1, "cells/lora-cat.webp"), row("echodistill", "mug", 0, "cells/gone.webp")]
    result = write_sheets(rows, tmp_path)
    check(result[:2], tmp_path)
    assert [one["picture"] for one in result[2:]] == ["", "cells/gone.webp"]
    assert [{**one, "picture": ""} for one in result] == [{**one, "picture": ""} for one in rows]


@pytest.mark.parametrize("address", ["gone.webp", "text.webp", "one.webp#xywh=0,0,51,20", "one.webp#xywh=0,1,50,20"])
def test_what_is_no_picture_is_an_oserror(tmp_path, address):
    Image.new("RGB", (50, 20)).save(tmp_path / "one.webp")
    (tmp_path / "text.webp").write_text("text")
    with pytest.raises(OSError, match=r"webp"):
        open_picture(tmp_path, address)


def test_results_are_rounded_and_one_a_line(tmp_path):
    suite = bench.Suite(("dotted-mug",), (0,), ("lora",))
    (tmp_path / "results.json").write_text(json.dumps([row("lora", "dotted-mug")], indent=2))
    (found,) = bench.gather(tmp_path, suite)
    assert found["metrics"] == {"dino": 0.123457}
    assert found["seconds"] == 1.23
    text = (tmp_path / "results.json").read_text()
    assert len(text.splitlines()) == 3
    assert json.loads(text) == [found]
    assert bench.gather(tmp_path, suite) == [found]
    assert (tmp_path / "results.json").read_text() == text


def test_every_method_has_one_table_that_shows_its_picture():
    tables = {m for table in (*paper.TABLES, paper.TRIALS) for m in table.methods}
    assert {spec.method for training in METHODS.values() for spec in training.evaluations} <= tables
