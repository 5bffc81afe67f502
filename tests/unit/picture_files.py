"""Pictures to write, files built byte by byte, and what reading them returns as an array."""

import struct
import zlib

import numpy as np
from PIL import Image

from echodistill_core.concept.photographs import load_photograph


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


def deep_grey():
    grey = np.linspace(0, 65535, 64 * 100).round().astype(np.uint16).reshape(64, 100)
    grey[0, :6] = [0, 128, 129, 65406, 65407, 65535]  # both sides of where rounding turns
    return grey


def scaled(grey, full=65535):
    return as_rgb(np.floor(grey.astype(np.float64) * 255 / full + 0.5).astype(np.uint8))


def write_images(folder, names):
    for name in names:
        Image.new("RGB", (64, 64), "red").save(folder / name, format="PNG")
