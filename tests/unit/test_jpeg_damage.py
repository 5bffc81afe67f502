"""Damage in the middle of JPEG files, and sound files of every kind that must not be taken for damaged."""

import io
import struct

import numpy as np
import pytest
from picture_files import noise, ramp
from PIL import Image, ImageFile

from echodistill_core.concept.jpeg import find_damage, zeros_are_illegal
from echodistill_core.concept.photographs import load_photograph
from echodistill_core.errors import InputError


@pytest.fixture(autouse=True)
def room_for_an_optimised_file(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)  # Pillow writes optimised files in one piece


def textured(side=256):
    """Slow waves with noise on them: blocks of varied length, as in a photograph."""
    y, x = np.mgrid[:side, :side]
    waves = np.stack([np.sin(x / 17) * 60, np.cos(y / 23) * 50, np.sin((x + y) / 31) * 70], axis=-1)
    return (128 + waves + noise(side, side, 3) * 0.15).clip(0, 255).astype(np.uint8)


def jpeg_bytes(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def is_taken_by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        try:
            image.load()
        except OSError:
            return False
    return True


def overwritten(data, kind, size):
    middle = len(data) // 2
    filling = {
        "zeros": bytes(size),
        "ones": b"\xff" * size,
        "random": np.random.default_rng(3).bytes(size),
        "missing": b"",
    }[kind]
    return data[:middle] + filling + data[middle + size :]


@pytest.mark.parametrize("kind", ["zeros", "ones", "random", "missing"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_overwritten_and_missing_bytes_are_damage(tmp_path, kind, options):
    whole = jpeg_bytes(textured(), quality=95, **options)
    broken = overwritten(whole, kind, 4096)
    assert find_damage(whole) is None
    assert find_damage(broken)
    if kind in ("zeros", "missing"):  # the others may leave a marker that libjpeg refuses by itself
        assert is_taken_by_pillow(broken)
    (tmp_path / "a.jpg").write_bytes(broken)
    with pytest.raises(InputError, match=r"a\.jpg .* is damaged"):
        load_photograph(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["zeros", "ones", "random", "missing"])
def test_damage_in_progressive_pictures_with_restart_markers(kind):
    whole = jpeg_bytes(textured(), quality=95, progressive=True, restart_marker_rows=1)
    assert find_damage(whole) is None
    assert find_damage(overwritten(whole, kind, 4096))


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}])
def test_each_kind_of_damage_is_told_from_the_others(options):
    whole = jpeg_bytes(textured(), quality=95, **options)
    middle = len(whole) // 2
    assert "zero bytes" in find_damage(overwritten(whole, "zeros", 200))
    assert "FF bytes" in find_damage(whole[:middle] + b"\xff" * 40 + b"\0" + whole[middle:])
    if not options:
        assert "more data" in find_damage(whole[:middle] + whole[middle - 2000 : middle] + whole[middle:])
        assert "end before" in find_damage(whole[: middle - 2000] + whole[middle:])


def test_restart_markers_out_of_order_missing_or_too_many():
    whole = jpeg_bytes(textured(), quality=90, restart_marker_rows=1)
    scan = whole.index(b"\xff\xda")
    first, second = whole.index(b"\xff\xd0", scan), whole.index(b"\xff\xd1", scan)
    swapped = bytearray(whole)
    swapped[first + 1], swapped[second + 1] = 0xD1, 0xD0
    assert "restart markers" in find_damage(bytes(swapped))
    assert "restart markers" in find_damage(whole[:first] + whole[second:])
    assert "restart markers" in find_damage(whole[:first] + b"\xff\xd0" + whole[first:])


def test_markers_that_may_not_stand_in_a_scan():
    whole = jpeg_bytes(textured(), quality=90)
    middle = len(whole) // 2
    for marker in (0xC0, 0xD8, 0x01, 0x4F):
        assert f"FF{marker:02X}" in find_damage(whole[:middle] + bytes([0xFF, marker]) + whole[middle:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_blocks": 5},
        {"progressive": True, "restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("quality", [1, 50, 100])
def test_sound_files_are_sound(options, quality):
    tile = np.tile(noise(16, 16, 3), (7, 6, 1))
    product = np.full((112, 96, 3), 255, np.uint8)
    product[30:60, 20:70] = noise(30, 50, 3)
    half = ramp(112, 96)
    half[60:] = 0
    pictures = [np.zeros((512, 512, 3), np.uint8), np.full((111, 97, 3), 255, np.uint8), ramp(), tile, product, half]
    for picture in pictures:
        for subsampling in ("4:4:4", "4:2:0"):
            assert find_damage(jpeg_bytes(picture, quality=quality, subsampling=subsampling, **options)) is None
        assert find_damage(jpeg_bytes(picture[..., 0], quality=quality, **options)) is None
    inks = np.dstack([ramp(), ramp()[..., 0]])
    file = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(file, "JPEG", quality=quality, **options)
    assert find_damage(file.getvalue()) is None


def test_a_flat_picture_may_hold_thousands_of_zero_bytes():
    flat = jpeg_bytes(np.zeros((512, 512, 3), np.uint8), optimize=True)
    assert bytes(1000) in flat
    assert find_damage(flat) is None


def test_what_lies_behind_the_picture_is_not_looked_at():
    whole = jpeg_bytes(textured(64))
    assert find_damage(whole + bytes(5000) + b"\xff" * 5000 + b"\xff\xd8\xff\xc0") is None


@pytest.mark.parametrize("padding", [bytes(5000), b"\xff" * 5000, b"some bytes of a camera"])
def test_padding_at_the_end_of_the_scan_is_no_damage(padding):
    whole = jpeg_bytes(textured(64))
    assert find_damage(whole[:-2] + padding + b"\xff\xd9") is None


def test_a_restart_marker_that_closes_the_scan_is_no_damage():
    whole = jpeg_bytes(textured(64), restart_marker_rows=1, subsampling="4:2:0")  # 4 rows: RST0 to RST2
    assert whole.count(b"\xff\xd2") == 1
    assert find_damage(whole[:-2] + b"\xff\xd3\xff\xd9") is None


@pytest.mark.parametrize("cut", range(2, 700, 37))
def test_truncated_and_changed_headers_raise_nothing(cut):
    whole = jpeg_bytes(textured(64))
    for data in (whole[:cut], whole[:cut] + bytes(9) + whole[cut + 9 :]):
        assert isinstance(find_damage(data), str | None)


def test_where_zeros_mean_a_flat_area_they_are_legal():
    # T.81 K.5: the standard tables' first AC symbols are 0x01 for luminance (one coefficient) and 0x00 for chrominance.
    tables = {(1, 0): 0x01, (1, 1): 0x00}
    whole_block = bytes([0, 63, 0])
    assert zeros_are_illegal(0xC0, {1: 0x00, 2: 0x11}, whole_block, tables)
    assert not zeros_are_illegal(0xC0, {2: 0x11}, whole_block, tables)
    assert not zeros_are_illegal(0xC2, {1: 0x00}, bytes([0, 0, 0]), tables)  # DC only: one bit a block is usual
    assert not zeros_are_illegal(0xC9, {1: 0x00}, whole_block, tables)  # arithmetic coding has no such table


def test_several_pictures_in_one_file(tmp_path):
    first, second = (Image.fromarray(textured(128)) for _ in range(2))
    first.save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[second])
    assert load_photograph(tmp_path / "a.mpo").image.size == (128, 128)
    assert struct.unpack(">H", (tmp_path / "a.mpo").read_bytes()[:2])[0] == 0xFFD8
