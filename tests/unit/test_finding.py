"""Which files of a folder are photographs, in which order, and what is said of the others."""

import os
from pathlib import Path

import pytest
from picture_files import write_images

from echodistill_core.concept.photographs import find_photographs, load_photograph, load_photographs
from echodistill_core.errors import InputError


def test_a_folder_is_sorted_naturally_and_holds_images_only(tmp_path):
    expected = ["00.jpg", "1.png", "2.JPG", "10.jpeg", "a.webp", "B.bmp", "b2x9.tif", "b2x10.gif", "c1.heic", "d.nef"]
    assert expected != sorted(expected)
    write_images(tmp_path, expected[::-1])
    write_images(tmp_path, [".hidden.png", "._2.JPG"])
    for name in ("notes.txt", "clip.mp4", "page.eps", "page.pdf", "weights.h5", "no_extension"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "sub.png").mkdir()
    write_images(tmp_path / "sub.png", ["inner.png"])
    assert [path.name for path in find_photographs(tmp_path)] == expected
    assert find_photographs(str(tmp_path)) == find_photographs(tmp_path)


def test_names_that_compare_equal_have_a_fixed_order(tmp_path):
    write_images(tmp_path, ["x1.png", "x01.png", "x001.png"])
    assert [path.name for path in find_photographs(tmp_path)] == ["x001.png", "x01.png", "x1.png"]


def test_accents_sort_alike_however_the_system_spells_them(tmp_path):
    composed, decomposed = "\u00e9", "e\u0301"
    orders = []
    for accent in (composed, decomposed):
        folder = tmp_path / f"{len(accent)}"
        folder.mkdir()
        write_images(folder, [f"{accent}.png", "ez.png", "z.png"])
        orders.append([path.name.replace(accent, composed) for path in find_photographs(folder)])
    assert orders[0] == orders[1]


def test_a_list_keeps_its_order_and_any_extension(tmp_path):
    write_images(tmp_path, ["b.png", "a", ".hidden"])
    listed = [tmp_path / "b.png", str(tmp_path / "a"), tmp_path / ".hidden"]
    assert find_photographs(listed) == [Path(path) for path in listed]
    assert [photograph.name for photograph in load_photographs(tuple(listed))] == ["b.png", "a", ".hidden"]
    assert find_photographs(tmp_path / "a") == [tmp_path / "a"]


@pytest.mark.parametrize("source", ["", "  ", []])
def test_nothing_named(source):
    with pytest.raises(InputError, match="no photographs were named"):
        find_photographs(source)


def test_missing_paths(tmp_path):
    write_images(tmp_path, ["a.png"])
    for source in (tmp_path / "nowhere", [tmp_path / "a.png", tmp_path / "nowhere"]):
        with pytest.raises(InputError, match=r"no file or folder .*nowhere"):
            load_photographs(source)
    with pytest.raises(InputError, match=r"gone\.png could not be read: there is no such file"):
        load_photograph(tmp_path / "gone.png")


def test_a_name_longer_than_systems_allow(tmp_path):
    with pytest.raises(InputError, match=r"x{99}"):
        find_photographs(tmp_path / ("x" * 5000))


def test_a_folder_in_a_list(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        find_photographs([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_photographs(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png could not be read: it is not a regular file"):
        load_photographs(tmp_path)


def test_folders_without_images(tmp_path):
    with pytest.raises(InputError, match=r"is empty"):
        load_photographs(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"holds 1 files, none of them an image"):
        load_photographs(tmp_path)
