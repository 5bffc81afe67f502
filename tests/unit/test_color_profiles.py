"""Embedded colour profiles against the matrices and curves that define the colour spaces, and ImageCms by hand."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from picture_files import as_rgb, deep_grey, noise, on_white, png_bytes, ramp, scaled
from PIL import Image, ImageCms

from echodistill_core.concept.photographs import load_photograph, load_photographs
from echodistill_core.concept.profiles import to_srgb

# CIE xy of red, green and blue, and the decoding exponent. White is D65, or D50 for ProPhoto (ISO 22028-2).
SPACES = {
    "Adobe RGB": ([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], (0.3127, 0.3290), 563 / 256),
    "Display P3": ([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], (0.3127, 0.3290), 2.2),
    "ProPhoto": ([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], (0.3457, 0.3585), 1.8),
}
D50 = np.array([0.9642, 1.0, 0.8249])  # the white of the profile connection space


def xyz(x, y):
    return np.array([x / y, 1.0, (1 - x - y) / y])


def matrix_to_d50(primaries, white):
    """Linear RGB to XYZ under D50: the primaries scaled to give white, adapted by Bradford's matrix."""
    columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
    columns = columns * np.linalg.solve(columns, xyz(*white))
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    ratio = (bradford @ D50) / (bradford @ xyz(*white))
    return np.linalg.inv(bradford) @ np.diag(ratio) @ bradford @ columns


def profile_bytes(tags, space, kind=b"mntr", pcs=b"XYZ "):
    """An ICC profile of version 2.1 (ICC.1:1998-09)."""
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags:
        value += b"\0" * (-len(value) % 4)
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += value
    body = struct.pack(">I", len(tags)) + table + data
    header = struct.pack(">I4sI4s4s4s12s4s", 128 + len(body), b"", 0x02100000, kind, space, pcs, bytes(12), b"acsp")
    return header.ljust(68, b"\0") + fixed(D50).ljust(60, b"\0") + body


def fixed(values):
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def described(text):
    text = text.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(name):
    primaries, white, exponent = SPACES[name]
    columns = matrix_to_d50(primaries, white).T
    tags = [(b"desc", described(name)), (b"wtpt", b"XYZ " + bytes(4) + fixed(D50))]
    tags += [
        (key, b"XYZ " + bytes(4) + fixed(column))
        for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    ]
    tags += [(key, gamma(exponent)) for key in (b"rTRC", b"gTRC", b"bTRC")]
    return profile_bytes(tags, b"RGB ")


def grey_profile(exponent, name="a grey"):
    tags = [(b"desc", described(name)), (b"wtpt", b"XYZ " + bytes(4) + fixed(D50)), (b"kTRC", gamma(exponent))]
    return profile_bytes(tags, b"GRAY")


def encoded(linear):
    """IEC 61966-2-1: linear light 0..1 to sRGB values 0..255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(color, name):
    """The closed form: curve, matrix to D50, sRGB's matrix back, sRGB's curve; what lies outside is clipped."""
    primaries, white, exponent = SPACES[name]
    to_linear = (color.astype(np.float64) / 255) ** (round(exponent * 256) / 256)
    srgb = matrix_to_d50([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], (0.3127, 0.3290))
    matrix = np.linalg.inv(srgb) @ matrix_to_d50(primaries, white)
    return encoded(to_linear @ matrix.T)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(path, note=None):
    """The pixels, and that exactly the note is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = np.asarray(load_photograph(path).image)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (note is not None), said
    assert note is None or (note in said[0] and path.name in said[0])
    return found


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_colour_spaces_against_their_matrices(tmp_path, name, suffix):
    color = ramp()
    options = {".webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"a{suffix}"
    Image.fromarray(color).save(path, icc_profile=rgb_profile(name), **options)
    expected = in_srgb(color, name)
    assert np.abs(expected - color).mean() > 2  # ignoring the profile would fail
    np.testing.assert_allclose(read(path, f"converted from {name} to sRGB"), expected, atol=2)


def test_in_jpeg(tmp_path):
    color = np.tile(np.array([200, 90, 60], np.uint8), (64, 64, 1))
    Image.fromarray(color).save(tmp_path / "a.jpg", quality=98, icc_profile=rgb_profile("ProPhoto"))
    np.testing.assert_allclose(read(tmp_path / "a.jpg", "ProPhoto"), in_srgb(color, "ProPhoto"), atol=6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pictures_in_srgb_stay_as_they_are_without_a_note(tmp_path, mode):
    image = Image.fromarray(ramp()).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=srgb_profile())
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_alpha_lies_on_white_after_the_colours_are_converted(tmp_path):
    color, alpha = ramp(64, 256), np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    image = Image.fromarray(np.dstack([color, alpha]))
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("Adobe RGB"))
    expected = on_white(in_srgb(color, "Adobe RGB"), alpha)
    np.testing.assert_allclose(read(tmp_path / "a.png", "Adobe RGB"), expected, atol=2)


def test_a_palette_is_converted_as_its_colours_are(tmp_path):
    index, palette = noise(64, 64), noise(256, 3)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"), transparency=5)
    expected = in_srgb(palette, "Display P3")
    expected[5] = 255
    np.testing.assert_allclose(read(tmp_path / "a.png", "Display P3"), expected[index], atol=2)


def test_a_transparent_colour_is_compared_before_the_conversion(tmp_path):
    color = noise(64, 64, 3)
    color[10:20, 5:9] = (1, 2, 3)
    Image.fromarray(color).save(tmp_path / "a.png", icc_profile=rgb_profile("Adobe RGB"), transparency=(1, 2, 3))
    see_through = (color == (1, 2, 3)).all(-1, keepdims=True)
    expected = np.where(see_through, 255, in_srgb(color, "Adobe RGB"))
    np.testing.assert_allclose(read(tmp_path / "a.png", "Adobe RGB"), expected, atol=2)


def test_a_turned_picture_is_converted_and_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp()).save(tmp_path / "a.png", icc_profile=rgb_profile("Adobe RGB"), exif=exif)
    expected = np.rot90(in_srgb(ramp(), "Adobe RGB"), -1)
    np.testing.assert_allclose(read(tmp_path / "a.png", "Adobe RGB"), expected, atol=2)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_profiles(tmp_path, mode):
    grey = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    values = np.asarray(image.convert("L"))
    expected = as_rgb(encoded(values / 255.0))
    np.testing.assert_allclose(read(tmp_path / "a.png", "a grey"), expected, atol=2)


def test_deep_grey_is_scaled_and_then_converted(tmp_path):
    rows = [row.astype(">u2").tobytes() for row in deep_grey()]
    chunk = (b"iCCP", b"grey\0\0" + zlib.compress(grey_profile(1.8)))
    (tmp_path / "a.png").write_bytes(png_bytes(100, 64, 16, 0, rows, [chunk]))
    expected = encoded((scaled(deep_grey()) / 255.0) ** 1.8)
    np.testing.assert_allclose(read(tmp_path / "a.png", "a grey"), expected, atol=2)


def ink_profile():
    """A printing profile of one table (lut8Type): Lab from CMYK by a simple rule on the corners of the cube."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    lightness = 255 * (1 - corners[:, :3].mean(1) * 0.6) * (1 - corners[:, 3] * 0.9)
    a = 128 + 60 * (corners[:, 1] - corners[:, 0]) * (1 - corners[:, 3])
    b = 128 + 60 * (corners[:, 2] - corners[:, 0]) * (1 - corners[:, 3])
    table = np.stack([lightness, a, b], axis=-1).round().clip(0, 255).astype(np.uint8)
    identity = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(np.eye(3).ravel())
    lut += identity * 4 + table.tobytes() + identity * 3
    tags = [(b"desc", described("a press")), (b"wtpt", b"XYZ " + bytes(4) + fixed(D50)), (b"A2B0", lut)]
    return profile_bytes(tags, b"CMYK", b"prtr", b"Lab ")


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_inks_against_imagecms_by_hand(tmp_path, suffix):
    inks = np.tile(np.array([[[200, 100, 0, 50]], [[0, 0, 0, 0]]], np.uint8).repeat(32, 0), (1, 64, 1))
    image = Image.fromarray(inks, "CMYK")
    options = {".jpg": {"quality": 98, "subsampling": "4:4:4"}}.get(suffix, {})
    image.save(tmp_path / f"a{suffix}", icc_profile=ink_profile(), **options)
    transform = ImageCms.buildTransform(
        io.BytesIO(ink_profile()), ImageCms.createProfile("sRGB"), "CMYK", "RGB", 1, 0x2000
    )
    expected = np.asarray(ImageCms.applyTransform(image, transform)).astype(int)
    assert np.abs(expected - np.asarray(image.convert("RGB"))).max() > 10
    found = read(tmp_path / f"a{suffix}", "a press")
    np.testing.assert_allclose(found, expected, atol=6 if suffix == ".jpg" else 1)


@pytest.mark.parametrize(
    ("mode", "profile", "note"),
    [
        ("RGB", b"no profile at all", "broken"),
        ("RGB", rgb_profile("Adobe RGB")[:200], "broken"),
        ("RGB", grey_profile(1.0), "it is for GRAY, and the picture is RGB"),
        ("L", rgb_profile("Adobe RGB"), "it is for RGB, and the picture is L"),
        ("CMYK", rgb_profile("Adobe RGB"), "it is for RGB, and the picture is CMYK"),
    ],
)
def test_broken_and_unfitting_profiles_are_ignored_with_a_note(tmp_path, mode, profile, note):
    image = Image.fromarray(ramp()).convert(mode)
    image.save(tmp_path / "a.tif", icc_profile=profile)
    found = read(tmp_path / "a.tif", note)
    np.testing.assert_allclose(found, np.asarray(image.convert("RGB")), atol=1)


def test_parts_of_a_profile_missing_in_a_jpeg(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a.jpg", icc_profile=rgb_profile("Adobe RGB"))
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"ICC_PROFILE\0") + 12
    (tmp_path / "a.jpg").write_bytes(data[: at + 1] + b"\x02" + data[at + 2 :])  # the first of two parts
    found = read(tmp_path / "a.jpg", "ignored, because it has parts missing")
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "a.jpg")))  # the pixels, taken for sRGB


def test_one_warning_names_all_files(tmp_path):
    for name in ("1.png", "2.png"):
        Image.fromarray(ramp(80 + len(list(tmp_path.iterdir())))).save(
            tmp_path / name, icc_profile=rgb_profile("Adobe RGB")
        )
    Image.fromarray(ramp()[::-1]).save(tmp_path / "3.png", icc_profile=b"broken")
    Image.fromarray(ramp()[:, ::-1]).save(tmp_path / "4.png")
    with pytest.warns(UserWarning, match="about the photographs") as caught:
        load_photographs(tmp_path)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "1.png, 2.png (converted from Adobe RGB to sRGB)" in message
    assert "3.png (its colour profile was ignored, because it is broken)" in message
    assert "4.png" not in message
    assert caught[0].filename == __file__


def test_a_name_in_a_profile_is_escaped_and_cut():
    primaries, _, exponent = SPACES["Adobe RGB"]
    columns = matrix_to_d50(primaries, (0.3127, 0.3290)).T
    tags = [(b"desc", described("\x1b[31m\n" + "x" * 500)), (b"wtpt", b"XYZ " + bytes(4) + fixed(D50))]
    tags += [
        (key, b"XYZ " + bytes(4) + fixed(column))
        for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    ]
    tags += [(key, gamma(exponent)) for key in (b"rTRC", b"gTRC", b"bTRC")]
    _, note = to_srgb(Image.fromarray(ramp()), profile_bytes(tags, b"RGB "))
    assert note.isprintable()
    assert len(note) < 100
