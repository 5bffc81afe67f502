"""Photographs against the arrays that were written, arithmetic done by hand, and files built byte by byte."""

import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from echodistill_core.concept.photographs import (
    MAX_PIXELS,
    MIN_SIDE,
    find_photographs,
    load_photograph,
    load_photographs,
    to_square,
)
from echodistill_core.errors import InputError

DREAMBENCH = Path(__file__).resolve().parents[2].parent / "shared" / "dreambench"
HEIC_BYTES = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def noise(*shape):
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def ramp(height=80, width=96):
    """Smooth and without symmetry: right, down and diagonal in red, green and blue."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2 + 20, y * 3, 250 - x - y], axis=-1).astype(np.uint8)


def pixels(path):
    photograph = load_photograph(path)
    assert photograph.image.mode == "RGB"
    return np.asarray(photograph.image)


def on_white(color, alpha):
    """The over operator on a white ground, in floating point: C a + 255 (1 - a)."""
    a = alpha.astype(np.float64)[..., None] / 255
    return color.astype(np.float64) * a + 255 * (1 - a)


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def png_bytes(width, height, depth, color_type, rows=None, chunks=()):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    extra = b"".join(chunk(kind, data) for kind, data in chunks)
    scanlines = b"" if rows is None else zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", scanlines) + chunk(b"IEND", b"")


def tiff_bytes(width, height, data, bits, photometric, extra_samples=None):
    """A little-endian TIFF of one uncompressed strip; every tag's values are 16-bit, sizes fit in 32."""
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric])]
    entries += [(273, 4, [8]), (277, 3, [len(bits)]), (278, 4, [height]), (279, 4, [len(data)])]
    if extra_samples is not None:
        entries.append((338, 3, [extra_samples]))
    data += b"\0" * (len(data) % 2)
    spill_at = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory, spill = struct.pack("<H", len(entries)), b""
    for tag, kind, values in entries:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, spill = struct.pack("<I", spill_at + len(spill)), spill + packed
        directory += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4) + spill


def bmp_bytes(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


# Formats and modes


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".png", {}), (".bmp", {}), (".tif", {}), (".tiff", {"compression": "tiff_lzw"}), (".webp", {"lossless": True})],
)
def test_lossless_colour_comes_back_exactly(tmp_path, suffix, options):
    color = noise(70, 90, 3)
    Image.fromarray(color).save(tmp_path / f"a{suffix}", **options)
    np.testing.assert_array_equal(pixels(tmp_path / f"a{suffix}"), color)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_colour_comes_back_closely(tmp_path, suffix):
    Image.fromarray(ramp()).save(tmp_path / f"a{suffix}", quality=98)
    error = np.abs(pixels(tmp_path / f"a{suffix}").astype(int) - ramp())
    assert error.max() <= 12
    assert error.mean() < 2


def test_name_and_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    Image.fromarray(ramp()).save(tmp_path / "My Dog.PNG", exif=exif, dpi=(300, 300))
    photograph = load_photograph(str(tmp_path / "My Dog.PNG"))
    assert photograph.name == "My Dog.PNG"
    assert photograph.image.info == {}
    assert not photograph.image.getexif()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_first_frame_of_several(tmp_path, suffix):
    frames = [np.full((64, 64, 3), value, np.uint8) for value in ((255, 0, 0), (0, 255, 0))]
    first, second = map(Image.fromarray, frames)
    options = {".webp": {"lossless": True}}.get(suffix, {})
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / f"a{suffix}") as written:
        assert written.n_frames == 2
    np.testing.assert_array_equal(pixels(tmp_path / f"a{suffix}"), frames[0])


@pytest.mark.parametrize("suffix", [".png", ".gif", ".bmp", ".tif"])
def test_grey_palette_and_one_bit(tmp_path, suffix):
    grey, palette, bits = noise(64, 72), noise(256, 3), noise(64, 72) > 127
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path / f"grey{suffix}"), as_rgb(grey))
    indexed = Image.fromarray(grey)
    indexed.putpalette(palette.tobytes())
    indexed.save(tmp_path / f"palette{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path / f"palette{suffix}"), palette[grey])
    Image.fromarray(bits).save(tmp_path / f"bits{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path / f"bits{suffix}"), as_rgb(np.where(bits, 255, 0)))


@pytest.mark.parametrize(
    ("suffix", "options"), [(".png", {}), (".tif", {}), (".webp", {"lossless": True, "exact": True})]
)
def test_alpha_lies_on_white(tmp_path, suffix, options):
    color, alpha = noise(64, 256, 3), np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    Image.fromarray(np.dstack([color, alpha])).save(tmp_path / f"a{suffix}", **options)
    found = pixels(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(found, on_white(color, alpha), atol=1.0)
    np.testing.assert_array_equal(found[:, 0], 255)
    np.testing.assert_array_equal(found[:, 255], color[:, 255])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_with_alpha_lies_on_white(tmp_path, suffix):
    grey, alpha = noise(64, 256), np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).save(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(pixels(tmp_path / f"a{suffix}"), on_white(as_rgb(grey), alpha), atol=1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_premultiplied_alpha_lies_on_white(tmp_path, channels):
    # Premultiplied: the file holds C a, so that over white it is C a + 255 - A. Zero alpha hides the colour.
    alpha = np.tile(np.arange(64, 256, dtype=np.uint8), (64, 1))
    stored = (noise(64, 192, channels) * (alpha[..., None] / 255)).astype(np.uint8)
    data = np.dstack([stored, alpha]).tobytes()
    photometric = 1 if channels == 1 else 2
    (tmp_path / "a.tif").write_bytes(tiff_bytes(192, 64, data, [8] * (channels + 1), photometric, extra_samples=1))
    expected = np.broadcast_to(stored + (255.0 - alpha[..., None]), (64, 192, 3))
    np.testing.assert_allclose(pixels(tmp_path / "a.tif"), expected, atol=2.0)


def test_palette_with_transparency_lies_on_white(tmp_path):
    index, palette, alpha = noise(64, 64), noise(256, 3), noise(256)
    indexed = Image.fromarray(index)
    indexed.putpalette(palette.tobytes())
    indexed.save(tmp_path / "many.png", transparency=alpha.tobytes())
    np.testing.assert_allclose(pixels(tmp_path / "many.png"), on_white(palette, alpha)[index], atol=1.0)
    expected = palette[index]
    expected[index == 5] = 255
    for name in ("one.png", "one.gif"):
        indexed.save(tmp_path / name, transparency=5)
        np.testing.assert_array_equal(pixels(tmp_path / name), expected)


def test_transparent_colour_lies_on_white(tmp_path):
    color, grey = noise(64, 64, 3), noise(64, 64)
    color[10:20, 5:9], grey[10:20, 5:9] = (1, 2, 3), 77
    Image.fromarray(color).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=77)
    np.testing.assert_array_equal(
        pixels(tmp_path / "rgb.png"), np.where((color == (1, 2, 3)).all(-1, keepdims=True), 255, color)
    )
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), as_rgb(np.where(grey == 77, 255, grey)))


def test_cmyk(tmp_path):
    inks = noise(64, 80, 4)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    c, k = inks[..., :3].astype(np.float64), inks[..., 3:].astype(np.float64)
    np.testing.assert_allclose(pixels(tmp_path / "a.tif"), (255 - c) * (255 - k) / 255, atol=1.0)
    flat = np.tile(np.array([200, 100, 0, 50], np.uint8), (64, 64, 1))
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.jpg", quality=98)  # Adobe's convention: stored inverted
    expected = (255 - np.array([200, 100, 0])) * (255 - 50) / 255
    np.testing.assert_allclose(pixels(tmp_path / "a.jpg"), np.broadcast_to(expected, (64, 64, 3)), atol=3.0)


# Deep grey and deep colour


def deep_grey():
    grey = np.linspace(0, 65535, 64 * 100).round().astype(np.uint16).reshape(64, 100)
    grey[0, :6] = [0, 128, 129, 65406, 65407, 65535]  # both sides of where rounding turns
    return grey


def scaled(grey, full=65535):
    return as_rgb(np.floor(grey.astype(np.float64) * 255 / full + 0.5).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("a.png", "I;16", "<u2"),
        ("a.tif", "I;16", "<u2"),
        ("b.tif", "I;16B", ">u2"),
        ("c.tif", "I", "<i4"),
    ],
)
def test_deep_grey_is_scaled_and_rounded(tmp_path, name, mode, dtype):
    grey = deep_grey()
    Image.frombytes(mode, (100, 64), grey.astype(dtype).tobytes()).save(tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.mode.startswith("I")
        np.testing.assert_array_equal(np.asarray(written), grey)
    found = pixels(tmp_path / name)
    np.testing.assert_array_equal(found, scaled(grey))
    assert np.unique(found).size == 256


def test_twelve_bit_grey_reaches_white(tmp_path):
    grey = np.linspace(0, 4095, 64 * 100).round().astype(np.uint16).reshape(64, 100)
    pairs = grey.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    (tmp_path / "a.tif").write_bytes(tiff_bytes(100, 64, packed.astype(np.uint8).tobytes(), [12], 1))
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), scaled(grey, 4095))


def test_deep_grey_where_zero_is_white(tmp_path):
    grey = deep_grey()
    (tmp_path / "a.tif").write_bytes(tiff_bytes(100, 64, grey.astype("<u2").tobytes(), [16], 0))
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), 255 - scaled(grey))


def test_deep_grey_with_a_transparent_value(tmp_path):
    grey = deep_grey()
    rows = [row.astype(">u2").tobytes() for row in grey]
    transparent = int(grey[30, 40])
    assert (scaled(grey) == scaled(grey)[30, 40]).all(-1).sum() > (grey == transparent).sum()
    data = png_bytes(100, 64, 16, 0, rows, [(b"tRNS", struct.pack(">H", transparent))])
    (tmp_path / "a.png").write_bytes(data)
    expected = np.where(as_rgb(grey) == transparent, 255, scaled(grey))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_deep_colour(tmp_path, name):
    grey = deep_grey()
    color = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1)
    if name == "a.png":
        data = png_bytes(100, 64, 16, 2, [row.astype(">u2").tobytes() for row in color])
    else:
        data = tiff_bytes(100, 64, color.astype("<u2").tobytes(), [16, 16, 16], 2)
    (tmp_path / name).write_bytes(data)
    np.testing.assert_allclose(pixels(tmp_path / name), color / 257.0, atol=1.0)


def test_values_without_an_agreed_white_are_refused(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif.*floating-point"):
        load_photograph(tmp_path / "float.tif")
    for low, high in ((0, 65536), (-1, 9)):
        values = np.full((64, 64), low, np.int32)
        values[0, 0] = high
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(InputError, match=rf"wide\.tif.*{low} to {high}"):
            load_photograph(tmp_path / "wide.tif")


# Orientation: what EXIF 2.32 (tag 0x0112) says the first row and column are, in numpy's terms

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 98}}.get(suffix, {})
    Image.fromarray(ramp()).save(tmp_path / f"a{suffix}", exif=exif, **options)
    found, expected = pixels(tmp_path / f"a{suffix}"), UPRIGHT[orientation](ramp())
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=12 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "I;16B"])
def test_exif_orientation_of_grey(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey, upright = (noise(64, 100),) * 2 if mode == "L" else (deep_grey(), scaled(deep_grey())[..., 0])
    data = grey.astype({"L": "u1", "I;16": "<u2", "I;16B": ">u2"}[mode]).tobytes()
    Image.frombytes(mode, (100, 64), data).save(tmp_path / "a.tif", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), as_rgb(UPRIGHT[orientation](upright)))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no directory",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
    ],
)
def test_broken_exif_does_not_cost_the_photograph(tmp_path, exif):
    Image.fromarray(ramp()).save(tmp_path / "a.jpg", exif=exif)
    assert pixels(tmp_path / "a.jpg").shape == ramp().shape


# Finding


def write_images(folder, names):
    for name in names:
        Image.new("RGB", (64, 64), "red").save(folder / name, format="PNG")


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
    with pytest.raises(InputError, match=r"pipe\.png \(it is not a regular file\)"):
        load_photographs(tmp_path)


def test_folders_without_images(tmp_path):
    with pytest.raises(InputError, match=r"is empty"):
        load_photographs(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"holds 1 files, none of them an image"):
        load_photographs(tmp_path)


# Files that cannot be read


def unreadable_files(folder):
    """File name to the word its reason has to hold."""
    Image.fromarray(ramp()).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-400])
    (folder / "whole.jpg").unlink()
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "phone.hif").write_bytes(HEIC_BYTES)
    (folder / "half.avif").write_bytes(HEIC_BYTES.replace(b"heic", b"avif"))
    Image.fromarray(ramp()).save(folder / "camera.nef", format="TIFF")  # as a raw file's preview looks to Pillow
    Image.fromarray(ramp().astype(np.float32)[..., 0]).save(folder / "float.tif")
    return {
        "cut.jpg": "cut off",
        "zero.png": "empty",
        "text.png": "no image",
        "phone.hif": "HIF",
        "half.avif": "damaged" if features.check("avif") else "AVIF",
        "camera.nef": "raw",
        "float.tif": "floating-point",
    }


def test_no_readable_photograph_names_every_file_and_why(tmp_path):
    reasons = unreadable_files(tmp_path)
    for source in (tmp_path, [tmp_path / name for name in reasons]):
        with pytest.raises(InputError) as caught:
            load_photographs(source)
        for name, reason in reasons.items():
            named = str(caught.value).split(f"{name} (")
            assert len(named) == 2, name
            assert reason in named[1].split(")")[0]


def test_unreadable_among_readable_ones_are_left_out_with_a_warning(tmp_path):
    reasons = unreadable_files(tmp_path)
    write_images(tmp_path, ["good.png"])
    with pytest.warns(UserWarning, match="left out") as caught:
        photographs = load_photographs(tmp_path)
    assert [photograph.name for photograph in photographs] == ["good.png"]
    assert len(caught) == 1
    assert all(f"{name} (" in str(caught[0].message) for name in reasons)
    assert "good.png" not in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_file_cut_off_counts_as_unreadable_whatever_pillow_was_told(tmp_path, monkeypatch, suffix, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    Image.fromarray(noise(96, 96, 3)).save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}").shape == (96, 96, 3)
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(InputError, match=r"could not be read"):
        load_photograph(tmp_path / f"a{suffix}")
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_limit_counts_readable_photographs_and_opens_no_more(tmp_path):
    write_images(tmp_path, ["2.png", "3.png"])
    (tmp_path / "1.png").write_text("no image")
    Image.new("RGB", (5, 5)).save(tmp_path / "4.png")  # an error, were it opened
    with pytest.warns(UserWarning, match=r"1\.png"):
        assert [photograph.name for photograph in load_photographs(tmp_path, limit=2)] == ["2.png", "3.png"]
    with pytest.raises(InputError, match=r"4\.png"):
        load_photographs(tmp_path)
    with pytest.raises(InputError, match="-1"):
        load_photographs(tmp_path, limit=-1)


# Sizes


@pytest.mark.parametrize(("width", "height"), [(MIN_SIDE - 1, 200), (200, MIN_SIDE - 1)])
def test_too_small(tmp_path, width, height):
    write_images(tmp_path, ["a.png"])
    Image.new("RGB", (width, height)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=rf"small\.png is {width}x{height} pixels.* 64 "):
        load_photographs(tmp_path)
    Image.new("RGB", (MIN_SIDE, MIN_SIDE)).save(tmp_path / "small.png")
    assert len(load_photographs(tmp_path)) == 2


# 64,008,000 is over our limit alone; at 100,000,000 Pillow warns; at 400,000,000 it raises by itself.
@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (10_000, 10_000), (20_000, 20_000)])
@pytest.mark.parametrize("kind", ["png", "bmp", "tif"])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, kind, width, height):
    # None of these files holds pixels: an error that speaks of the size can only come from the header.
    data = {
        "png": png_bytes(width, height, 8, 2),
        "bmp": bmp_bytes(width, height),
        "tif": tiff_bytes(width, height, b"", [8, 8, 8], 2),
    }[kind]
    (tmp_path / f"bomb.{kind}").write_bytes(data)
    write_images(tmp_path, ["a.png"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"bomb\.{kind}.*{width * height:,}.*64,000,000"):
            load_photographs(tmp_path)


def test_own_limit_stands_where_a_program_lifted_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_bytes(20_000, 20_000, 8, 2))
    with pytest.raises(InputError, match=r"20000x20000 = 400,000,000 pixels.*64,000,000"):
        load_photograph(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is None


def test_a_lower_limit_of_pillow_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, ["a.png"])
    for limit in (3000, 1000):  # 64 x 64 = 4096: Pillow warns above its limit, and raises above twice it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=rf"4,096 pixels.* at most {limit:,}:"):
            load_photograph(tmp_path / "a.png")


def test_limits(tmp_path):
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    (tmp_path / "a.png").write_bytes(png_bytes(8000, 8000, 1, 0))  # exactly 64,000,000: gets as far as its pixels
    with pytest.raises(InputError, match="could not be read"):
        load_photograph(tmp_path / "a.png")


# Squares


def lanczos_weights(source, target, start, length):
    """Rows of the resampling matrix: Lanczos-3, widened when shrinking, over source[start:start+length]."""
    scale = length / target
    width = max(scale, 1.0)
    rows = np.zeros((target, source))
    for i in range(target):
        center = start + (i + 0.5) * scale
        for j in range(source):
            x = (j + 0.5 - center) / width
            if abs(x) < 3:
                rows[i, j] = np.sinc(x) * np.sinc(x / 3)
        rows[i] /= rows[i].sum()
    return rows


@pytest.mark.parametrize(("height", "width", "size"), [(60, 75, 32), (75, 60, 32), (40, 40, 24), (20, 26, 48)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_squares_against_a_naive_lanczos(height, width, size, crop):
    image = ramp(height, width)
    image[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 128)
    side = min(height, width)
    boxes = {
        "center": ((height - side) / 2, side, (width - side) / 2, side),
        "squash": (0, height, 0, width),
    }
    top, box_height, left, box_width = boxes[crop]
    vertical = lanczos_weights(height, size, top, box_height)
    horizontal = lanczos_weights(width, size, left, box_width)
    # Pillow stores eight bits between its two passes, horizontal first.
    between = np.einsum("xj,ijc->ixc", horizontal, image.astype(np.float64)).round().clip(0, 255)
    expected = np.einsum("yi,ixc->cyx", vertical, between).clip(0, 255)
    found = to_square(Image.fromarray(image), size, crop)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected, atol=1.5)


@pytest.mark.parametrize(("height", "width"), [(64, 100), (100, 64), (64, 64)])
def test_center_only_cuts_when_the_shorter_side_fits(height, width):
    image = noise(height, width, 3)
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = image[top : top + 64, left : left + 64].transpose(2, 0, 1)
    np.testing.assert_array_equal(to_square(Image.fromarray(image), 64, "center").numpy(), expected)


def test_squares_refuse_other_crops_and_sizes():
    with pytest.raises(InputError, match=r"crop is 'middle'.*center, squash"):
        to_square(Image.new("RGB", (64, 64)), 32, "middle")
    with pytest.raises(InputError, match="0"):
        to_square(Image.new("RGB", (64, 64)), 0, "center")


# Real photographs


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason=f"the photographs of DreamBench are not in {DREAMBENCH}")
@pytest.mark.parametrize("subject", ["dog", "cat", "backpack"])
def test_dreambench(subject):
    names = sorted(path.name for path in (DREAMBENCH / subject).glob("*.jpg"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photographs = load_photographs(DREAMBENCH / subject)
    assert [photograph.name for photograph in photographs] == names
    for photograph in photographs:
        with Image.open(DREAMBENCH / subject / photograph.name) as stored:
            turned = stored.getexif().get(0x0112, 1) >= 5
            assert photograph.image.size == (stored.size[::-1] if turned else stored.size)
        square = to_square(photograph.image, 128, "center").double()
        # The mean colour survives resampling: compare it with the middle square of the full-size picture.
        full = np.asarray(photograph.image).astype(np.float64)
        side = min(full.shape[:2])
        top, left = ((full.shape[0] - side) // 2, (full.shape[1] - side) // 2)
        mean = full[top : top + side, left : left + side].mean((0, 1))
        np.testing.assert_allclose(square.mean((1, 2)), mean, atol=1.0)
        assert math.isclose(square.std(), full[top : top + side, left : left + side].std(), rel_tol=0.15)
