"""Converts images with embedded colour profiles (Adobe RGB, Display P3, ProPhoto, grey, CMYK) to sRGB.

The intent is relative colorimetric with black point compensation: in-gamut colours are unchanged, as the likeness of a
subject requires; the perceptual intent would shift all colours to fit those out of gamut. For matrix profiles, which
cameras and phones write, both intents are equal.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

from ..messages import shortened

# Colour space in a profile's header -> Pillow's modes.
_MODES = {"RGB": ("RGB", "RGBA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
_SAME = 2  # of 255: rounding differences between vendors' sRGB profiles


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert an image of mode L, LA, RGB, RGBA or CMYK to sRGB. Returns it and a note for the user; alpha is kept.

    profile: the bytes of its ICC profile. The result has mode RGB or RGBA. For an sRGB profile the image is returned
    unchanged with an empty note. A profile that is malformed or has another colour space than the image is ignored,
    with a note.
    """
    if not features.check("littlecms2"):
        return image, "its colour profile was ignored, because this Pillow was built without LittleCMS"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        name = shortened(ImageCms.getProfileDescription(source).strip() or "without a name", 60)
        if space == "RGB" and image.mode in ("L", "LA") and _is_srgb(source):
            return image, ""  # equal parts of sRGB's red, green and blue are the same grey
        if image.mode not in _MODES.get(space, ()):
            kind = shortened(space, 10)
            return image, f"its colour profile ({name}) was ignored: it is for {kind}, and the picture is {image.mode}"
        if space == "RGB" and _is_srgb(source):
            return image, ""
        converted = _converted(image, source)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return image, "its colour profile was ignored, because it is broken"
    return converted, f"converted from {name} to sRGB"


def _converted(image: Image.Image, source: Any) -> Image.Image:
    """A picture converted to sRGB: mode RGB, or RGBA where it has alpha, which stays."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    color = image.convert({"LA": "L", "RGBA": "RGB"}[image.mode]) if alpha else image
    if color.mode == "L":
        # LittleCMS interpolates grey between a few points: errors up to 10 of 255 in the shadows of linear profiles.
        greys = Image.frombytes("L", (256, 1), bytes(range(256)))
        table = np.asarray(_transformed(greys, source, ImageCms.Flags.NOOPTIMIZE))[0]
        result = Image.fromarray(table[np.asarray(color)])
    else:
        result = _transformed(color, source)
    if alpha:
        result.putalpha(alpha)
    return result


def _transformed(image: Image.Image, source: Any, flags: int = 0) -> Image.Image:
    """A picture without alpha as sRGB by LittleCMS: mode RGB. flags: ImageCms.Flags beside black point compensation."""
    result = ImageCms.profileToProfile(
        image,
        source,
        _srgb(),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | flags,
    )
    assert result is not None  # None only with inPlace
    return result


def _is_srgb(source: Any) -> bool:
    """Whether an RGB profile maps a grid of the whole colour cube to itself, within _SAME."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    difference = np.asarray(_converted(Image.fromarray(grid), source)).astype(int) - grid
    return int(np.abs(difference).max()) <= _SAME


@cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")
