"""PNG files with large text, profiles and Exif data: their pixels count."""

import io
import struct
import zlib

import numpy as np
import pytest
from picture_files import noise, pixels, png_bytes
from PIL import Image, PngImagePlugin

from echodistill_core.concept.photographs import load_photograph
from echodistill_core.concept.png import MAX_METADATA, MAX_PROFILE, ProfileError, strip_text
from echodistill_core.errors import InputError

COLOR = noise(64, 80, 3)
ROWS = [row.tobytes() for row in COLOR]


def workflow(size):
    return zlib.compress(b'{"nodes": []}' * (size // 13))


def text_chunks(size):
    """A ComfyUI workflow in each of the three chunks that PNG 1.2 has for text."""
    packed = workflow(size)
    return [
        (b"zTXt", b"workflow\0\0" + packed),
        (b"iTXt", b"prompt\0\1\0\0\0" + packed),
        (b"tEXt", b"parameters\0" + b"x" * size),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_large_text_does_not_cost_the_pixels(tmp_path, kind):
    data = png_bytes(80, 64, 8, 2, ROWS, [text_chunks(3_000_000)[kind]] * 2)
    (tmp_path / "a.png").write_bytes(data)
    if kind < 2:
        with pytest.raises(ValueError, match="too large"):  # what Pillow alone makes of it
            Image.open(io.BytesIO(data)).load()
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_text_behind_the_pixels(tmp_path):
    whole = png_bytes(80, 64, 8, 2, ROWS)
    text = png_bytes(80, 64, 8, 2, None, text_chunks(3_000_000))
    begin, end = text.index(b"zTXt") - 4, text.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:-12] + text[begin:end] + whole[-12:])
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def test_broken_text_does_not_cost_the_pixels(tmp_path):
    data = png_bytes(80, 64, 8, 2, ROWS, [(b"zTXt", b"a\0\0not deflated"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no")])
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def exif_turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def test_text_that_turns_the_picture_is_read(tmp_path):
    exif = exif_turned(6)
    profile = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode()  # as ImageMagick writes it
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for chunk in (
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"eXIf", exif[6:]),
    ):
        (tmp_path / "a.png").write_bytes(png_bytes(80, 64, 8, 2, ROWS, [*text_chunks(3_000_000), chunk]))
        np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.rot90(COLOR, -1))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_could_turn_the_picture_is_not_inflated_beyond_the_limit(tmp_path, kind):
    bomb = zlib.compress(bytes(MAX_METADATA + 1))
    head = b"Raw profile type exif\0\0" if kind == b"zTXt" else b"XML:com.adobe.xmp\0\1\0\0\0"
    (tmp_path / "a.png").write_bytes(png_bytes(80, 64, 8, 2, ROWS, [(kind, head + bomb)]))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def test_text_that_could_turn_the_picture_is_read_once(tmp_path):
    chunk = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(MAX_METADATA)))
    assert 70 * MAX_METADATA > PngImagePlugin.MAX_TEXT_MEMORY
    (tmp_path / "a.png").write_bytes(png_bytes(80, 64, 8, 2, ROWS, [chunk] * 70))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def test_oversized_exif_data_are_not_read(tmp_path):
    data = png_bytes(80, 64, 8, 2, ROWS, [(b"eXIf", exif_turned(6)[6:] + bytes(MAX_METADATA))])
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def test_a_profile_is_inflated_up_to_its_limit():
    def found(profile, cut=0):
        packed = zlib.compress(profile)
        chunk = (b"iCCP", b"name\0\0" + packed[: len(packed) - cut])
        return strip_text(io.BytesIO(png_bytes(80, 64, 8, 2, ROWS, [chunk])))[1]

    assert found(b"small") == b"small"
    assert isinstance(found(b"small", cut=6), ProfileError)
    assert isinstance(found(bytes(MAX_PROFILE + 1)), ProfileError)
    assert strip_text(io.BytesIO(png_bytes(80, 64, 8, 2, ROWS)))[1] is None


def test_a_profile_too_large_is_noted_and_the_pixels_are_read(tmp_path):
    chunk = (b"iCCP", b"name\0\0" + zlib.compress(bytes(MAX_PROFILE + 1)))
    (tmp_path / "a.png").write_bytes(png_bytes(80, 64, 8, 2, ROWS, [chunk]))
    with pytest.warns(UserWarning, match=r"a\.png: its colour profile was ignored"):
        np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOR)


def test_the_view_is_the_file_without_its_text():
    chunks = [(b"gAMA", struct.pack(">I", 45455)), *text_chunks(9000), (b"tRNS", bytes(6))]
    kept = [chunk for chunk in chunks if chunk[0] in (b"gAMA", b"tRNS")]
    view, _ = strip_text(io.BytesIO(png_bytes(80, 64, 8, 2, ROWS, chunks)))
    expected = png_bytes(80, 64, 8, 2, ROWS, kept)
    assert view.read() == expected
    for start, size in ((5, 40), (0, 3), (len(expected) - 7, 100), (30, 60)):  # forth and back
        assert view.seek(start) == start
        assert view.read(size) == expected[start : start + size]
    assert view.seek(-4, io.SEEK_END) == len(expected) - 4
    assert view.read() == expected[-4:]


def test_a_png_cut_off_within_a_text_chunk_is_refused(tmp_path):
    data = png_bytes(80, 64, 8, 2, ROWS, text_chunks(9000))
    (tmp_path / "a.png").write_bytes(data[: data.index(b"zTXt") + 20])
    with pytest.raises(InputError, match=r"a\.png could not be read"):
        load_photograph(tmp_path / "a.png")
