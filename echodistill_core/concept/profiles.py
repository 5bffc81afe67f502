"""Embedded colour profiles: pictures in Adobe RGB, Display P3, ProPhoto, a grey or a printing space become sRGB.

The intent is relative colorimetric with black point compensation: a colour that sRGB can show stays what it is, which
the likeness of a subject needs; the perceptual intent would shift all colours to make room for those that it cannot
show. Profiles of three curves and a matrix, which cameras and phones write, give the same either way.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

from ..messages import shortened

# The colour space in a profile's header to the modes that it describes.
_MODES = {"RGB": ("RGB", "RGBA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
_SAME = 2  # of 255: profiles of sRGB by different makers differ by their rounding


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """A picture of mode L, LA, RGB, RGBA or CMYK in sRGB, and a note for the user; alpha is kept.

    profile: the bytes of the ICC profile that its values are in. The picture comes back in mode RGB or RGBA, or as it
    is where the profile describes sRGB, and then the note is empty. A profile that is broken, or is of another kind of
    colour than the picture, is ignored with a note.
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
        # LittleCMS interpolates grey between a few points, some 10 of 255 off in the shadows of a linear profile.
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
    assert result is not None  # it is only where a picture is changed in place
    return result


def _is_srgb(source: Any) -> bool:
    """Whether a profile of RGB leaves the colours of a grid through the whole cube where they are."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    difference = np.asarray(_converted(Image.fromarray(grid), source)).astype(int) - grid
    return int(np.abs(difference).max()) <= _SAME


@cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")
