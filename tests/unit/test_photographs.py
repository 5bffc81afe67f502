"""Photographs that are left out or refused, and squares, against arithmetic done by hand."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import bmp_bytes, noise, pixels, png_bytes, ramp, tiff_bytes, write_images
from PIL import Image, ImageFile, features

from echodistill_core.concept.photographs import (
    MAX_PIXELS,
    MIN_SIDE,
    load_photograph,
    load_photographs,
    to_square,
)
from echodistill_core.errors import InputError

DREAMBENCH = Path(__file__).resolve().parents[2].parent / "shared" / "dreambench"
HEIC_BYTES = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


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
        "text.png": "text",
        "phone.hif": "HEIC/HEIF picture; install pillow-heif",
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
def test_a_truncated_file_is_unreadable_whatever_pillow_is_set_to(tmp_path, monkeypatch, suffix, lenient):
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
    Image.new("RGB", (5, 5)).save(tmp_path / "4.png")  # would be named, were it opened
    with pytest.warns(UserWarning, match="left out") as caught:
        assert [photograph.name for photograph in load_photographs(tmp_path, limit=2)] == ["2.png", "3.png"]
    said = " ".join(str(warning.message) for warning in caught)
    assert "1.png (it is text" in said
    assert "4.png" not in said
    with pytest.warns(UserWarning, match="left out") as caught:
        load_photographs(tmp_path)
    assert any("4.png (it is 5x5" in str(warning.message) for warning in caught)
    with pytest.raises(InputError, match="-1"):
        load_photographs(tmp_path, limit=-1)


# Sizes


@pytest.mark.parametrize(("width", "height"), [(MIN_SIDE - 1, 200), (200, MIN_SIDE - 1)])
def test_too_small(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "small.png")
    for load, source in ((load_photograph, tmp_path / "small.png"), (load_photographs, tmp_path)):
        with pytest.raises(InputError, match=rf"small\.png is {width}x{height} pixels.* 64 "):
            load(source)
    write_images(tmp_path, ["a.png"])
    with pytest.warns(UserWarning, match=rf"left out.*small\.png \(it is {width}x{height} pixels.* 64 "):
        assert [photograph.name for photograph in load_photographs(tmp_path)] == ["a.png"]
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"bomb\.{kind}.*{width * height:,}.*64,000,000"):
            load_photographs(tmp_path)
    write_images(tmp_path, ["a.png"])
    with pytest.warns(UserWarning, match=rf"left out.*bomb\.{kind} \(.*{width * height:,}.*64,000,000"):
        assert [photograph.name for photograph in load_photographs(tmp_path)] == ["a.png"]


def test_our_pixel_limit_applies_without_pillows(tmp_path, monkeypatch):
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
