"""NumPy's .npy header: read by a pattern, not evaluated; its claims are checked before any array exists."""

import math
import re
import struct

import numpy as np

from jaxsub import errors

MAX_HEADER = 65536  # bytes
MAX_DIM, MAX_DIMS = 2**48 - 1, 32
_VALUE = r"(?:'[^'\\]*'|\"[^\"\\]*\"|True|False|\([0-9, L]*\))"
_ENTRY = re.compile(rf"\s*['\"](descr|fortran_order|shape)['\"]\s*:\s*({_VALUE})\s*(?:,|(?=\}}))")
_SHAPE = re.compile(r"\(((\d{1,19}L?, ?)+(\d{1,19}L?)?)?\)")  # without a comma it would be a number
_DESCR = re.compile(r"([<>|=]?)([fiubc?])(\d{0,2})")
_SIZES = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,), "c": (8, 16), "?": (0, 1)}


def head_size(start):
    """Bytes of magic, version and header, from the first 12 bytes; None if this is no .npy."""
    if len(start) < 12 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        return None
    return 10 + struct.unpack_from("<H", start, 8)[0] if start[6] == 1 else 12 + struct.unpack_from("<L", start, 8)[0]


def parse(head, size, path, key):
    """(dtype, shape, fortran order) of a header.

    Args:
        head: the bytes up to the data.
        size: bytes of the whole .npy; the data must fill the rest exactly.
        path, key: for the message.

    Raises:
        InputError: pickled objects, structured or raw types, sizes that do not match.
    """

    def fail(reason, hint="re-save the arrays with a current numpy, or as safetensors"):
        raise errors.InputError(path, reason, key=key, hint=hint, rule="H8")

    text = head[10 if head[6] == 1 else 12 :].decode("latin-1")
    fields = _fields(text.strip(" \n"))
    if re.search(r"['\"]descr['\"]\s*:\s*\[", text):
        fail("is a structured array", "save each field on its own")
    if fields is None:
        fail("has a header that numpy does not write")
    dtype = _dtype(fields["descr"][1:-1], fail)
    shape = [int(n.rstrip("L")) for n in fields["shape"][1:-1].replace(" ", "").split(",") if n.rstrip("L")[:20]]
    if len(shape) > MAX_DIMS or any(d > MAX_DIM for d in shape):
        fail(f"has a shape of {len(shape)} sizes up to {max(shape)}")
    declared = math.prod(shape) * dtype.itemsize
    if declared != size - len(head):
        fail(
            f"declares {declared} bytes of data and has {size - len(head)}", "it is cut short or damaged; get it again"
        )
    return dtype, tuple(shape), fields["fortran_order"] == "True"


def _fields(text):
    """The three entries of the header's dict, or None if it holds anything else."""
    found, at, count = {}, 1, 0
    while text[:1] == "{" and (match := _ENTRY.match(text, at)):
        found[match[1]], at, count = match[2], match.end(), count + 1
    good = text[at:].strip() == "}" and len(found) == count == 3  # Python would take the last of two
    good = good and found["descr"][0] in "'\"" and found["fortran_order"] in ("True", "False")
    good = good and found["shape"][0] == "(" and _SHAPE.fullmatch(found["shape"])
    return found if good else None


def _dtype(descr, fail):
    if "O" in descr:
        fail("holds Python objects, which are a pickle and never read", "save plain arrays")
    if "V" in descr:
        fail(
            f"holds raw bytes of type {errors.quote(descr, 20)}: np.savez writes bfloat16 so", "save it as safetensors"
        )
    match = _DESCR.fullmatch(descr)
    if not match or (int(match[3] or 0)) not in _SIZES[match[2]]:
        fail(f"has the type {errors.quote(descr, 20)!r}, which is no number")
    return np.dtype(descr)


def array(data, dtype, shape, fortran):
    """The array in `data`, row-major, native byte order."""
    flat = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(flat, dtype=dtype.newbyteorder("="), order="C")
