"""A cosine matrix as a PNG data URI: colour is the sign, opacity the size, so that it sits on light and dark paper."""

import base64
import struct
import zlib

import numpy as np

# Okabe-Ito blue and vermilion, lightened until both read on white and on near-black.
POSITIVE, NEGATIVE = (28, 126, 204), (222, 104, 20)
_LEVELS = 255  # palette entries; an odd number, so that one of them is exactly 0


def data_uri(values):
    """`data:image/png;base64,...` of a matrix, one pixel a value.

    Args:
        values: (rows, columns) float in [-1, 1]; values outside are clipped, NaN is drawn as 0.
    """
    scaled = np.clip(np.nan_to_num(np.asarray(values, float)), -1, 1)
    index = np.rint((scaled + 1) / 2 * (_LEVELS - 1)).astype(np.uint8)
    rows, columns = index.shape
    filtered = np.concatenate([np.zeros((rows, 1), np.uint8), index], axis=1)  # each row starts with filter type 0
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits a pixel, palette
    colours, alphas = _palette()
    chunks = [(b"IHDR", header), (b"PLTE", colours), (b"tRNS", alphas)]
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join([_chunk(*chunk) for chunk in chunks])
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _palette():
    """(colours, alphas) of the levels from -1 to 1."""
    level = np.linspace(-1, 1, _LEVELS)
    colours = np.where(level[:, None] < 0, np.array(NEGATIVE), np.array(POSITIVE)).astype(np.uint8)
    return colours.tobytes(), np.rint(255 * np.abs(level)).astype(np.uint8).tobytes()


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
