"""Names, shapes and places of weights: what is known from headers alone. No arrays, no jax.

Model --tensors--> Tensor --extent--> bytes in a file
      --adapters-> LoraPair (two Tensors and a scale)
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

EMPTY: Mapping[str, Any] = types.MappingProxyType({})


def numpy_dtype(name):
    """The numpy dtype called `name`, including the small floats of ml_dtypes ('bfloat16', ...)."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


@dataclasses.dataclass(frozen=True, slots=True)
class FileId:
    """A file as it was when its header was read; later reads must find the same four numbers."""

    path: str
    size: int  # bytes
    mtime_ns: int
    device: int
    inode: int


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie: contiguous, row-major, little-endian, from `offset` on."""

    file: FileId
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A stored array. `dtype` is a numpy or ml_dtypes name; `extent` is None when only `Model.load` can read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    extent: Extent | None = None

    @property
    def size(self):
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def num_bytes(self):
        """Stored bytes."""
        return self.size * numpy_dtype(self.dtype).itemsize

    @property
    def is_float(self):
        """Whether the entries are floating point of any width: only those are weights."""
        return self.dtype in FLOATS


FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})


@dataclasses.dataclass(frozen=True, slots=True)
class LoraPair:
    """A low-rank update, Delta-W = scale * B @ A (transposed if `transposed`), kept as its factors.

    `a` is (r, i) and `b` is (o, r) once flattened to matrices (a convolution's A is (r, c, kh, kw));
    `shape` is the shape of Delta-W in the orientation of the stored base weight.
    """

    a: Tensor
    b: Tensor
    scale: float
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def rank(self):
        """r, from the tensor itself."""
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """One model as its headers describe it.

    Attributes:
        path: the file or folder.
        format: name of the reader in `jaxsub.formats`.
        tensors: plain arrays by name (LoRA factors are not among them).
        adapters: low-rank updates by layer name.
        skipped: tensors that are not weights, with the reason.
        warnings: what a careful user should know, one sentence each.
        metadata: strings found beside the weights (base model, labels); data, never trusted.
        load: reads one whole tensor by name when it has no extent.
        files: FileIds of what `load` reads; none where that is the file at `path`.
    """

    path: str
    format: str
    tensors: Mapping[str, Tensor]
    adapters: Mapping[str, LoraPair] = dataclasses.field(default_factory=lambda: EMPTY)
    skipped: Mapping[str, str] = dataclasses.field(default_factory=lambda: EMPTY)
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=lambda: EMPTY)
    load: Callable[[str], np.ndarray] | None = None
    files: tuple[FileId, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ModelRef:
    """A model of a collection; `id` is its path relative to the collection, without the ending."""

    id: str
    path: str
    format: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=lambda: EMPTY)
