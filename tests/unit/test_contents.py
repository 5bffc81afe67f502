"""Files under wrong names: what they hold is told by their bytes."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
from picture_files import noise, tiff_bytes
from PIL import Image, features

from echodistill_core.concept.contents import RAW, recognise
from echodistill_core.concept.photographs import load_photograph
from echodistill_core.errors import InputError


def media(brand, *compatible):
    """The first box of an ISO base media file (ISO 14496-12, 4.3), and some bytes of the next."""
    body = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\0\x08free" + bytes(200)


FILES = {
    "heic": (media(b"heic", b"mif1", b"heic"), "HEIC/HEIF picture; install pillow-heif, or export it as JPEG"),
    "hevc": (media(b"hevc", b"mif1"), "HEIC/HEIF"),
    "mif1": (media(b"mif1", b"heic"), "HEIC/HEIF"),
    "cr3": (media(b"crx ", b"isom"), "camera raw file"),
    "mp4": (media(b"isom", b"mp41"), "video"),
    "mov": (media(b"qt  "), "video"),
    "mkv": (b"\x1aE\xdf\xa3" + bytes(100), "video"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL picture; install pillow-jxl-plugin"),
    "jxl codestream": (b"\xff\x0a" + bytes(100), "JPEG XL"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF document; export its picture"),
    "page": (b"\n<!DOCTYPE html><html><body>404", "web page or XML; download the picture itself"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "SVG drawing; export it as PNG"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(100), "archive; unpack it"),
    "psd": (b"8BPS\0\x01" + bytes(100), "Photoshop"),
    "raf": (b"FUJIFILMCCD-RAW 0201" + bytes(100), "camera raw file, to be exported"),
    "cr2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(100), "camera raw file"),
    "text": (b"a caption of a dog\n", "text, not a picture"),
    "gif": (b"GIF89a", "GIF picture, but damaged"),
    "junk": (bytes(range(1, 255)), "damaged, or no image of a format"),
}


@pytest.fixture
def no_plugins(monkeypatch):
    for module in ("pillow_heif", "pillow_avif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_named_jpg_is_named_for_what_it_is(tmp_path, no_plugins, kind):
    data, said = FILES[kind]
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.jpg .*: it is (an? )?{said}"):
        load_photograph(tmp_path / "a.jpg")


def test_brands_of_one_container():
    assert recognise(media(b"mif1", b"avif")).readable == "AVIF"
    assert recognise(media(b"avis")).readable == "AVIF"
    assert recognise(media(b"heix")).readable == "HEIF"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM", "AVIF"])
def test_formats_that_pillow_writes_are_recognised(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not write AVIF")
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow does not write JPEG 2000")
    path = tmp_path / "a"
    Image.fromarray(noise(64, 64, 3)).save(path, format=kind)
    assert recognise(path.read_bytes()).readable == kind


@pytest.mark.parametrize(
    "head", [b"BMW has four wheels, and the dog has four legs", b"P5 is a town", b"Riff raff", b"II"]
)
def test_text_that_begins_like_a_picture_is_text(head):
    assert recognise(head).name.startswith("text")


def test_text_cut_within_a_character_is_text():
    assert recognise(("x" + "é" * 4000).encode()[:4096]).name.startswith("text")
    assert recognise(b"\xff\xfe\x00\x01" * 100) is None
    assert recognise(b"") is None


def test_raw_files_that_are_tiffs_are_not_opened_for_their_preview(tmp_path):
    def add_tags(data, *entries):
        """More entries in the directory of `tiff_bytes`, which stays sorted by being written anew at the end."""
        at = int.from_bytes(data[4:8], "little")
        count = int.from_bytes(data[at : at + 2], "little")
        old = [data[at + 2 + 12 * i :][:12] for i in range(count)]
        new = [tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in entries]
        table = sorted(old + new, key=lambda entry: int.from_bytes(entry[:2], "little"))
        directory = len(table).to_bytes(2, "little") + b"".join(table) + bytes(4)
        return data[:4] + len(data).to_bytes(4, "little") + data[8:] + directory

    plain = tiff_bytes(64, 64, noise(64, 64, 3).tobytes(), [8, 8, 8], 2)
    (tmp_path / "plain.tif").write_bytes(plain)
    assert load_photograph(tmp_path / "plain.tif").image.size == (64, 64)
    for tags in ([(50706, 0x0401)], [(254, 1), (330, 8)]):  # DNGVersion; a preview with the picture in a sub-directory
        (tmp_path / "a.tif").write_bytes(add_tags(plain, *tags))
        with pytest.raises(InputError, match=r"a\.tif.*camera raw file"):
            load_photograph(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(add_tags(plain, (254, 0)))
    assert load_photograph(tmp_path / "a.tif").image.size == (64, 64)
    assert recognise(FILES["raf"][0]) is RAW


def test_an_installed_plugin_is_asked_to_open_its_format(tmp_path, monkeypatch):
    color = noise(64, 80, 3)

    class Opened(Image.Image):
        format = "HEIF"

    def register():
        def opener(file, name):
            image = Image.fromarray(color)
            image.format = "HEIF"
            return image

        Image.register_open("HEIF", opener, lambda head: head[4:12] == b"ftypheic")

    Image.init()
    if "HEIF" in Image.OPEN:
        pytest.skip("a plugin for HEIF is registered already")
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    (tmp_path / "phone.jpg").write_bytes(FILES["heic"][0])
    try:
        np.testing.assert_array_equal(np.asarray(load_photograph(tmp_path / "phone.jpg").image), color)
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID[:] = [name for name in Image.ID if name != "HEIF"]


@pytest.mark.slow
def test_pillow_heif_itself(tmp_path):
    pytest.importorskip("pillow_heif")
    # In a process of its own: a plugin that is registered stays.
    script = """
import sys, numpy as np, pillow_heif
from PIL import Image
color = np.tile(np.array([200, 90, 60], np.uint8), (64, 80, 1))
pillow_heif.from_pillow(Image.fromarray(color)).save(sys.argv[1], format="HEIF", quality=95)
from echodistill_core.concept.photographs import load_photograph
found = np.asarray(load_photograph(sys.argv[1]).image).astype(int)
assert found.shape == color.shape and abs(found - color).max() < 8
"""
    command = [sys.executable, "-c", script, str(tmp_path / "phone.jpg")]
    subprocess.run(command, check=True, env=os.environ, timeout=120)
