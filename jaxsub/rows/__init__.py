"""The models of one layer as a merge method takes them, and what it gives back. Layers larger than memory included.

    Rows: N models of one layer           in blocks of columns, or as matrices, or by inner products alone
      weights                             --> no base
      weights minus a base                --> the base is put back into every result
      low-rank updates b a                --> `lora`: never multiplied out but a few rows at a time
      anything in memory                  --> `ArrayRows`: coefficients of a bundle, rotated rows, tests
    Result: Values, block by block; or Factors of a low-rank update

A method needs one of three things, and so works on every kind of rows that has it: coefficients from inner products
(`gram`, `combination`), a function of columns (`map`, `fold`), or matrices (`matrices.of`). Numbers are float32, or
float64 where one of the models is; sums over models are made in that dtype. Combinations are made on the host, where
the weights are read: sending them to a device would take longer than adding them up.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, placement, precision
from jaxsub.linalg import gram as grams, products

CHUNK = 65536  # columns of a model that random draws come in: blocks hold whole ones
BLOCK_BYTES = 8 * 2**20  # of one block of all models: kernels that draw hold several times as much beside it
PRODUCT_ROWS = 64, 256  # of a product that are made at a time: BLAS needs some, and little is gained by more
PIECE_BYTES = 4 * 2**20  # of a piece of all models: what is summed should still be in the cache


@dataclasses.dataclass(frozen=True)
class Block:
    """The same columns of all models, from flat index `start` on; columns beyond `count` are zero padding."""

    start: int
    count: int
    x: np.ndarray  # (N, W), less the base where there is one
    base: np.ndarray | None  # (W,)


@dataclasses.dataclass(frozen=True)
class Values:
    """A merged layer as numbers, the base put back.

    Attributes:
        blocks: () -> iterator of (flat index, 1-D array), in order and without a gap; to be run through once. Every
            block but the last ends at a multiple of CHUNK.
        piece: (start, count) -> 1-D array of these numbers, from several threads at once if need be; or None.
        width: numbers of a piece that are made at little cost, a multiple of CHUNK.
    """

    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]]
    piece: Callable[[int, int], np.ndarray] | None = None
    width: int = 0

    @classmethod
    def of_pieces(cls, piece, size, width):
        """Values of `size` numbers that are made piece by piece."""

        def blocks():
            for start in range(0, size, width):
                yield start, piece(start, min(width, size - start))

        return cls(blocks, piece, width)

    @classmethod
    def of_array(cls, array):
        """Values of an array of weights as they are, to be run through any number of times."""
        flat = np.asarray(array).reshape(-1)
        return cls(lambda: iter([(0, flat)]))

    def array(self, shape, out=None):
        """All of it in one array: `out`, whose dtype then decides, or a new one.

        `out` may be memory that the values are made from, where each block needs none of what lies before it there.
        """
        flat = None if out is None else out.reshape(-1)
        for start, part in self.blocks():
            if flat is None:
                flat = np.empty(math.prod(shape), part.dtype)
            flat[start : start + len(part)] = part
        return np.empty(shape) if flat is None else flat.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A merged low-rank update b @ a.

    Attributes:
        a, b: (k, i) and (o, k) float64, k the rank, of equal norms.
        error: norm of what truncation to this rank took away, relative to the norm of the whole.
    """

    a: np.ndarray
    b: np.ndarray
    error: float = 0.0


class Rows:
    """N rows of one layer; a subclass gives `blocks`, and what it can do better than by blocks.

    Attributes:
        name: of the layer.
        shape: of one row.
        model_ids: N names.
        weights: (N,) float64 given by the user, or None.
        is_update: whether rows are differences to a base (or low-rank updates), and not weights themselves.
        statistics: Rows of the user's statistics of the same models, or None.
        dtype: of the numbers, float32 or float64.
        width: columns W of a block.
        chunk: columns; every block starts at a multiple of it.
    """

    def __init__(self, name, shape, model_ids, *, weights=None, is_update=False, statistics=None, dtype="float32"):
        self.name, self.shape, self.model_ids = name, tuple(shape) or (1,), tuple(model_ids)
        self.weights, self.is_update, self.statistics = weights, is_update, statistics
        self.dtype = np.dtype(dtype)
        self.width = block_width(self.size, self.num_models, self.dtype.itemsize)
        self.chunk = min(CHUNK, self.width)

    @property
    def num_models(self):
        """N."""
        return len(self.model_ids)

    @property
    def size(self):
        """D, numbers of one row."""
        return math.prod(self.shape)

    @property
    def is_matrix(self):
        """Whether a row is a matrix (o, i)."""
        return len(self.shape) == 2

    def blocks(self):
        """Yields the Blocks in order; a block's arrays hold until the next one is asked for."""
        raise NotImplementedError

    def matrix(self, n):
        """Row n as an array of `shape` on the device."""
        raise NotImplementedError

    def read_matrix(self, n, out):
        """Row n into a NumPy array of `shape` and of the rows' dtype."""
        out[:] = self.matrix(n)

    def factors(self):
        """(a (N, r, i), b (N, o, r) with the scale in it) of low-rank updates; None of other rows."""
        return None

    def fold(self, kernel, carry, *arguments):
        """kernel(carry, x, start, *arguments) over the blocks; x (N, W) and start are on the device."""
        with jax.enable_x64(True):
            for block in self.blocks():
                carry = kernel(carry, jax.device_put(block.x), jnp.int64(block.start), *arguments)
                jax.block_until_ready(carry)  # only then may the block's memory be filled again
        return carry

    def map(self, kernel, *arguments):
        """The row of kernel(x, start, *arguments) -> (W,) of every block's columns, the base put back."""
        return Values(functools.partial(self._mapped, kernel, arguments))

    def _mapped(self, kernel, arguments, beside=None):
        others = itertools.repeat(None)
        if beside is not None:
            beside.width = self.width
            others = beside.blocks()
        with jax.enable_x64(True):
            for block, other in zip(self.blocks(), others, strict=False):
                more = () if other is None else (jax.device_put(other.x),)
                y = kernel(jax.device_put(block.x), *more, jnp.int64(block.start), *arguments)
                yield block.start, self._finished(np.asarray(y)[: block.count], block)

    def map_beside(self, kernel, *arguments):
        """As `map`, of kernel(x, statistics (N, W), start, *arguments); statistics of the rows' own shape."""
        return Values(functools.partial(self._mapped, kernel, arguments, self.statistics))

    @staticmethod
    def _finished(y, block):
        return y if block.base is None else y + block.base[: block.count]

    def gram(self):
        """(N, N) float64 inner products of the rows."""
        dtype = precision.compute_dtype(self.dtype.name, self.num_models**2 * self.size)
        mesh, nothing = placement.make_mesh(1, is_local=True), np.zeros((0, self.num_models), np.float32)
        total, is_zero = np.zeros((self.num_models, self.num_models)), np.ones(self.num_models, bool)
        with jax.enable_x64(True):
            for block in self.blocks():
                sums, _ = grams.dense_gram(block.x, nothing, mesh=mesh, dtype=dtype)
                sums = jax.device_get(sums)
                total += sums.gram + sums.cross[:, None] + sums.cross + sums.mean_square
                for n in np.flatnonzero(is_zero):
                    is_zero[n] = not block.x[n].any()
        total[is_zero], total[:, is_zero] = 0.0, 0.0  # what products of centred rows leave there is rounding
        return total

    def combination(self, coefficients):
        """The row sum_n c_n x_n, plus the base where there is one.

        Args:
            coefficients: (N,).
        """
        c = np.asarray(coefficients, np.float64)
        used = np.flatnonzero(c)
        piece = functools.partial(self._combined, used, c[used].astype(self.dtype))
        return Values.of_pieces(piece, self.size, piece_width(max(len(used), 1), self.dtype.itemsize))

    def _combined(self, used, c, start, count):
        """The numbers start to start + count of sum_n c_n x_n over the models `used`, the base put back."""
        raise NotImplementedError

    def times_right(self, n, right, found=None):
        """`found` plus row n, a matrix (o, i), times `right` (i, i); `found` is what this gave for other rows."""
        product = products.matmul(self.matrix(n).astype(right.dtype), right)
        return product if found is None else found + product

    def summed(self, found):
        """The row of what `times_right` added up."""
        return self.result(found)

    def result(self, array):
        """The row with these numbers (`shape`) of the update, or of the weights where there is no base."""
        return Values(functools.partial(self._put, np.asarray(array).reshape(-1)))

    def product(self, u, x):
        """The row u @ x, (o, k) and (k, i) NumPy arrays, never whole in memory."""
        return Values.of_pieces(functools.partial(self._multiplied, u, x), self.size, product_width(self.shape[1]))

    def _multiplied(self, u, x, start, count):
        columns = self.shape[1]
        first, last = start // columns, -(-(start + count) // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # told by the one who writes the result
            part = (u[first:last] @ x).reshape(-1)[start - first * columns :][:count]
        return self._put_piece(start, part)

    def _put_piece(self, start, part):
        """`part`, the update from flat index `start` on, with the base put back."""
        return part

    def _put(self, flat):
        yield 0, flat


class ArrayRows(Rows):
    """Rows in memory: (N, *shape), taken as they are."""

    def __init__(self, x, name="", model_ids=(), *, base=None, **more):
        """Takes a stack.

        Args:
            x: (N, *shape) of any float dtype, finite; less the base.
            name: of the layer.
            model_ids: N names; numbers by default.
            base: (*shape) that is put back into every result, or None.
            more: see `Rows`.
        """
        x = np.asarray(x)
        dtype = "float64" if x.dtype == np.float64 else "float32"
        ids = model_ids or tuple(map(str, range(len(x))))
        super().__init__(name, x.shape[1:], ids, is_update=more.pop("is_update", base is not None), dtype=dtype, **more)
        self.x = x.astype(dtype, copy=False).reshape(len(x), *self.shape)
        self.base = None if base is None else np.asarray(base, dtype).reshape(-1)

    def blocks(self):
        """See `Rows`."""
        flat = self.x.reshape(self.num_models, -1)
        for start in range(0, self.size, self.width):
            part = flat[:, start : start + self.width]
            base = None if self.base is None else self.base[start : start + self.width]
            count, room = part.shape[1], self.width - part.shape[1]
            if room:
                part = np.pad(part, ((0, 0), (0, room)))
            yield Block(start, count, np.ascontiguousarray(part), base)

    def _combined(self, used, c, start, count):
        return self._put_piece(start, np.dot(c, self.x.reshape(self.num_models, -1)[used, start : start + count]))

    def matrix(self, n):
        """See `Rows`."""
        return jnp.asarray(self.x[n])

    def _put(self, flat):
        yield 0, self._put_piece(0, flat)

    def _put_piece(self, start, part):
        return part if self.base is None else part + self.base[start : start + len(part)]


def block_width(size, num_models, itemsize):
    """Columns W of a block: a power of two for short rows, else whole chunks, alike, as many as BLOCK_BYTES hold."""
    if size <= CHUNK:
        return max(64, 1 << (size - 1).bit_length()) if size else 64
    most = max(1, BLOCK_BYTES // (num_models * itemsize * CHUNK))
    chunks = -(-size // CHUNK)
    count = -(-chunks // most)
    return -(-chunks // count) * CHUNK


def piece_width(num_models, itemsize):
    """Numbers of a piece of a combination: whole chunks, as many as PIECE_BYTES hold, one at least."""
    return max(1, PIECE_BYTES // (num_models * itemsize * CHUNK)) * CHUNK


def product_width(columns):
    """Numbers of a piece of a product with so many columns: whole chunks, and PRODUCT_ROWS as PIECE_BYTES allow."""
    least, most = PRODUCT_ROWS
    rows = min(most, max(least, PIECE_BYTES // (8 * columns)))
    return -(-rows * columns // CHUNK) * CHUNK


def require_models(rows, method, least, most=None):
    """Raises ConfigError where a method does not take so many models."""
    if rows.num_models < least or (most is not None and rows.num_models > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise errors.ConfigError(f"method={method}: takes {wanted} models, {rows.num_models} are given")
