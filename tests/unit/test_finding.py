"""Which files of a folder are photographs, in which order, and what is said of the others."""

import os
import warnings
from pathlib import Path

import pytest
from picture_files import noise, ramp, write_images
from PIL import Image

from echodistill_core.concept import finding
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
    with pytest.warns(UserWarning, match="same bytes"):
        assert [photograph.name for photograph in load_photographs(tuple(listed))] == ["b.png", "a", ".hidden"]
    assert find_photographs(tmp_path / "a") == [tmp_path / "a"]


@pytest.mark.parametrize("source", ["", "  ", []])
def test_nothing_named(source):
    with pytest.raises(InputError, match="no photographs were named"):
        find_photographs(source)


def test_missing_paths(tmp_path):
    write_images(tmp_path, ["a.png"])
    for source in (tmp_path / "nowhere", [tmp_path / "a.png", tmp_path / "nowhere"]):
        with pytest.raises(InputError, match=r"nowhere"):
            load_photographs(source)
    with pytest.raises(InputError, match=r"gone\.png"):
        load_photograph(tmp_path / "gone.png")


def test_a_name_longer_than_systems_allow(tmp_path):
    with pytest.raises(InputError, match=r"x{90}"):
        find_photographs(tmp_path / ("x" * 5000))


def test_a_folder_in_a_list(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        find_photographs([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_photographs(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png"):
        load_photographs(tmp_path)


def test_folders_without_images(tmp_path):
    with pytest.raises(InputError, match=r"is empty"):
        load_photographs(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"1 files"):
        load_photographs(tmp_path)


# Entries that are named as pictures and are none


def links_are_there(folder):
    try:
        (folder / "probe").symlink_to("nowhere")
    except OSError:  # Windows without the right to make links
        return False
    (folder / "probe").unlink()
    return True


def test_links_that_lead_nowhere_say_so(tmp_path):
    if not links_are_there(tmp_path):
        pytest.skip("links cannot be made here")
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    (tmp_path / "b.jpg").symlink_to("c.jpg")
    (tmp_path / "c.jpg").symlink_to("b.jpg")
    said = {"a.jpg": "is a link to gone.jpg, which does not exist", "b.jpg": "is a link that leads to itself"}
    for name, reason in said.items():
        for call, source in (
            (load_photograph, tmp_path / name),
            (find_photographs, tmp_path / name),
            (find_photographs, [tmp_path / name]),
        ):
            with pytest.raises(InputError, match=rf"{name} .*it {reason}"):
                call(source)
    with pytest.raises(InputError, match=r"a\.jpg \(.*b\.jpg \(.*c\.jpg \("):
        find_photographs(tmp_path)
    Image.fromarray(ramp()).save(tmp_path / "gone.jpg")
    assert load_photograph(tmp_path / "a.jpg").image.size == (96, 80)


def test_entries_that_are_no_photographs_are_left_out_and_named(tmp_path):
    write_images(tmp_path, ["1.png"])
    Image.new("RGB", (48, 48)).save(tmp_path / "2.png")
    (tmp_path / "3.jpg").mkdir()
    (tmp_path / "4.nef").write_bytes(b"II*\0")
    reasons = {"2.png": "48x48", "3.jpg": "it is a folder", "4.nef": "raw"}
    if links_are_there(tmp_path):
        (tmp_path / "5.jpg").symlink_to("gone.jpg")
        reasons["5.jpg"] = "a link to gone.jpg"
    with pytest.warns(UserWarning, match="left out") as caught:
        assert [photograph.name for photograph in load_photographs(tmp_path)] == ["1.png"]
    assert len(caught) == 1
    for name, reason in reasons.items():
        assert reason in str(caught[0].message).split(f"{name} (")[1].split(")")[0]
    assert [path.name for path in find_photographs(tmp_path)] == ["1.png", "2.png", "4.nef"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"not one photograph.*2\.png.*3\.jpg.*4\.nef"):
        load_photographs(tmp_path)


# Pictures under odd names, and files that are none


def test_pictures_under_odd_names_are_read_with_a_note(tmp_path):
    odd = ["IMG", "a.jpg_large", "b.jpg~"]
    for number, name in enumerate(odd):
        Image.fromarray(ramp(80 + number)).save(tmp_path / name, format="JPEG")
    Image.fromarray(ramp(90)).save(tmp_path / "c.JFIF", format="JPEG")
    with pytest.warns(UserWarning, match="no picture's ending") as caught:
        found = load_photographs(tmp_path)
    assert {photograph.name for photograph in found} == {*odd, "c.JFIF"}
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in odd)
    assert "c.JFIF" not in str(caught[0].message)


def test_sidecars_and_hidden_files_are_left_without_a_word(tmp_path):
    write_images(tmp_path, ["a.png"])
    write_images(tmp_path, [".DS_Store", "._a.jpg", ".hidden", "a.thm"])
    (tmp_path / "a.txt").write_text("P6 a dog\non a sofa")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.xmp").write_text("<?xml version='1.0'?>")
    (tmp_path / "a.mov").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(100))
    (tmp_path / "empty").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [photograph.name for photograph in load_photographs(tmp_path)] == ["a.png"]


def test_only_the_first_bytes_of_other_files_are_read(tmp_path, monkeypatch):
    write_images(tmp_path, ["a.png"])
    (tmp_path / "weights.bin").write_bytes(bytes(1_000_000))
    taken = []
    monkeypatch.setattr(finding, "recognise", lambda head: taken.append(len(head)))
    assert len(find_photographs(tmp_path)) == 1
    assert taken == [finding.HEAD]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_under_an_odd_name_is_not_opened(tmp_path):
    write_images(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe")
    assert [path.name for path in find_photographs(tmp_path)] == ["a.png"]


# What is said of names and copies


def test_names_in_messages_are_escaped_and_cut(tmp_path):
    name = "a\x1b[31m\n\u202e.png"
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("this system does not allow such names")
    for call, source in ((load_photograph, tmp_path / name), (load_photographs, tmp_path), (find_photographs, name)):
        with pytest.raises(InputError) as caught:
            call(source)
        assert str(caught.value).isprintable()
        assert r"a\x1b[31m\n\u202e.png" in str(caught.value)
    (tmp_path / name).unlink()
    write_images(tmp_path, ["a.png"])
    (tmp_path / ("x" * 240 + ".png")).write_bytes(b"")
    with pytest.warns(UserWarning, match="left out") as caught:
        load_photographs(tmp_path)
    assert "x" * 100 not in str(caught[0].message)
    assert "....png" not in str(caught[0].message)
    assert "x.png (it is empty)" in str(caught[0].message)


def test_copies_of_a_file_are_noted_and_used(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "1.png")
    Image.fromarray(noise(80, 96, 3)).save(tmp_path / "2.png")
    for copy in ("3.png", "4.png"):
        (tmp_path / copy).write_bytes((tmp_path / "1.png").read_bytes())
    with pytest.warns(UserWarning, match=r"3\.png, 4\.png \(.* 1\.png\)") as caught:
        assert len(load_photographs(tmp_path)) == 4
    assert len(caught) == 1
    assert "2.png" not in str(caught[0].message)
