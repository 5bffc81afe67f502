"""Modes, depths and orientations against the arrays that were written and arithmetic done by hand."""

import struct

import numpy as np
import pytest
from picture_files import as_rgb, deep_grey, noise, on_white, pixels, png_bytes, ramp, scaled, tiff_bytes
from PIL import Image

from echodistill_core.concept.photographs import load_photograph
from echodistill_core.errors import InputError

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
