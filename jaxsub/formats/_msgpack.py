"""A walk over flax's msgpack files that finds where the arrays lie and copies none of them.

An array is extension 1: a msgpack triple (shape, dtype name, bytes). An array over 1 GB is a dict marked
`__msgpack_chunked_array__` with its shape and flat pieces; it has no extent.
"""

import dataclasses
import math
import struct

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _header, _names

MAX_DEPTH = 64
MAX_DIMS, MAX_DIM = 32, 2**48 - 1
MAX_TEXT = 1 << 16  # bytes of a key or a small value
MAX_ITEMS = 2_000_000  # of all kinds, seconds; an array takes about five
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = frozenset(name for name, _ in _header.DTYPES.values()) - _header.PACKED | {"complex128"}
_WIDTHS = {  # first byte -> (struct format of what follows, what it is)
    0xC4: ("B", "bytes"), 0xC5: (">H", "bytes"), 0xC6: (">I", "bytes"),
    0xC7: ("B", "ext"), 0xC8: (">H", "ext"), 0xC9: (">I", "ext"),
    0xCA: (">f", "number"), 0xCB: (">d", "number"),
    0xCC: ("B", "number"), 0xCD: (">H", "number"), 0xCE: (">I", "number"), 0xCF: (">Q", "number"),
    0xD0: ("b", "number"), 0xD1: (">h", "number"), 0xD2: (">i", "number"), 0xD3: (">q", "number"),
    0xD9: ("B", "text"), 0xDA: (">H", "text"), 0xDB: (">I", "text"),
    0xDC: (">H", "list"), 0xDD: (">I", "list"), 0xDE: (">H", "map"), 0xDF: (">I", "map"),
}  # fmt: skip
_WINDOW = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """An array: its type, and the offset of each of its pieces with their numbers of entries."""

    shape: tuple
    dtype: str
    pieces: tuple  # of (offset, entries)

    def tensor(self, name, file):
        """The Tensor of this name; with an extent if it lies in one piece."""
        extent = descriptors.Extent(file, self.pieces[0][0]) if len(self.pieces) == 1 else None
        return descriptors.Tensor(name, self.shape, self.dtype, extent)

    def load(self, file):
        """The array, its pieces joined."""
        flat, at = np.empty(math.prod(self.shape), descriptors.numpy_dtype(self.dtype)), 0
        for offset, count in self.pieces:
            if count:
                _files.read_into(descriptors.Extent(file, offset), 0, memoryview(flat[at : at + count].view(np.uint8)))
            at += count
        return flat.reshape(self.shape)


def walk(reader):
    """name -> Leaf of the arrays in a file, in file order.

    Raises:
        InputError: not msgpack, cut short, text after the end, repeated keys, an array that is not what it claims.
    """
    cursor = _Cursor(reader)
    tree = cursor.value(0)
    if cursor.at != reader.file.size or not isinstance(tree, dict):
        raise cursor.fault("is no single msgpack dict" if not isinstance(tree, dict) else "goes on after its end")
    leaves = {}
    _collect(tree, "", leaves, cursor)
    return leaves


def _collect(tree, prefix, leaves, cursor):
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, dict):
            if value.get(_CHUNKED) is True:
                value = _joined(value, cursor)
            else:
                _collect(value, name, leaves, cursor)
                continue
        if isinstance(value, Leaf):
            if name in leaves:
                raise cursor.fault("is the name of two arrays", name)
            leaves[name] = value


def _joined(value, cursor):
    """The Leaf of a chunked array, {'shape': {'0': ..}, 'chunks': {'0': Leaf, ..}}."""
    shape, chunks = value.get("shape"), value.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
        raise cursor.fault("has a chunked array without shape and chunks")
    sizes = cursor.shape([shape.get(str(i)) for i in range(len(shape))])
    leaves = [chunks.get(str(i)) for i in range(len(chunks))]
    if any(not isinstance(leaf, Leaf) or leaf.dtype != leaves[0].dtype for leaf in leaves):
        raise cursor.fault("has a chunked array whose pieces differ")
    pieces = tuple(p for leaf in leaves for p in leaf.pieces)
    if sum(count for _, count in pieces) != math.prod(sizes):
        raise cursor.fault("has a chunked array whose pieces do not add up to its shape")
    return Leaf(sizes, leaves[0].dtype, pieces)


class _Cursor:
    """A place in the file, with a window of bytes around it."""

    def __init__(self, reader):
        self.reader, self.at, self.leaves, self.items = reader, 0, 0, 0
        self._start, self._window = 0, b""

    def fault(self, reason, key=None):
        return errors.InputError(
            self.reader.file.path, f"{reason} (byte {self.at})", key=key, hint="it is damaged; get it again", rule="H7"
        )

    def take(self, count):
        """The next bytes; only small things are taken, arrays are skipped."""
        if count > MAX_TEXT or self.at + count > self.reader.file.size:
            raise self.fault(f"is cut short, or no flax file: {count} bytes announced")
        if not self._start <= self.at <= self.at + count <= self._start + len(self._window):
            self._start = self.at
            self._window = self.reader.read(self.at, min(max(count, _WINDOW), self.reader.file.size - self.at))
        begin = self.at - self._start
        self.at += count
        return self._window[begin : begin + count]

    def head(self):
        """(kind, number) of the next item: a length, a count of members, or the value itself."""
        first = self.take(1)[0]
        if first in _WIDTHS:
            form, kind = _WIDTHS[first]
            return kind, struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if first <= 0x7F or first >= 0xE0:
            return "number", first if first <= 0x7F else first - 256
        if first <= 0x9F:
            return ("map" if first <= 0x8F else "list"), first & 0x0F
        if first <= 0xBF:
            return "text", first & 0x1F
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first in (0xC0, 0xC2, 0xC3):
            return "constant", {0xC0: None, 0xC2: False, 0xC3: True}[first]
        raise self.fault(f"holds the unknown type {first:#04x}")

    def value(self, depth):
        """The next item; arrays as Leaf, other extensions and lists as None."""
        kind, number = self.head()
        self.items += 1
        if self.items > MAX_ITEMS:
            raise self.fault(f"holds more than {MAX_ITEMS} items")
        if depth > MAX_DEPTH:
            raise self.fault(f"is nested more than {MAX_DEPTH} deep")
        if kind == "text":
            return self._text(number)
        if kind == "bytes":
            return self._skip(number)
        if kind == "ext":
            return self._extension(number)
        if kind in ("map", "list") and number > self.reader.file.size - self.at:
            raise self.fault(f"announces {number} items")
        if kind == "map":
            return self._map(number, depth)
        if kind == "list":
            return {str(i): self.value(depth + 1) for i in range(number)}
        return number

    def _text(self, length):
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault("holds a text that is not UTF-8") from None

    def _skip(self, length):
        if length > self.reader.file.size - self.at:
            raise self.fault(f"is cut short: {length} bytes announced")
        self.at += length

    def _map(self, count, depth):
        found = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)) or key in found:
                raise self.fault("has a key that is repeated, or neither text nor number", key)
            found[key] = self.value(depth + 1)
        return found

    def _extension(self, length):
        code = struct.unpack("b", self.take(1))[0]
        end = self.at + length
        if end > self.reader.file.size:
            raise self.fault(f"is cut short: {length} bytes announced")
        if code not in (1, 3):  # 2 is a complex number; others are none of flax's
            self.at = end
            return None
        self.leaves += 1
        _names.check_count(self.leaves, self.reader.file.path)
        leaf = self._array(end)
        return leaf if code == 1 else None

    def _array(self, end):
        if self.head() != ("list", 3):
            raise self.fault("holds an array that is no triple")
        kind, count = self.head()
        if kind != "list" or count > MAX_DIMS:
            raise self.fault("holds an array without a shape")
        shape = self.shape([self.value(MAX_DEPTH) for _ in range(count)])
        dtype = self.value(MAX_DEPTH)
        kind, num_bytes = self.head()
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self.fault(f"holds an array of the type {errors.quote(dtype, 40)!r}")
        expected = math.prod(shape) * descriptors.numpy_dtype(dtype).itemsize
        if kind != "bytes" or num_bytes != expected or self.at + num_bytes != end:
            raise self.fault(f"holds an array of {expected} bytes in a place of {num_bytes}")
        leaf = Leaf(shape, dtype, ((self.at, math.prod(shape)),))
        self.at = end
        return leaf

    def shape(self, sizes):
        if len(sizes) > MAX_DIMS or any(type(s) is not int or not 0 <= s <= MAX_DIM for s in sizes):
            raise self.fault("holds an impossible shape")
        return tuple(sizes)
