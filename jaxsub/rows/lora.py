"""Rows that are low-rank updates: inner products, combinations and small cores from the factors alone.

    W_n = s_n b_n a_n = Q_b C_n Q_a.T        Q_b (o, p), Q_a (i, q) orthonormal bases of all b, of all a; C_n (p, q)

What commutes with rotations of both sides is done on the cores C_n. Methods that look at single entries get them a few
rows of the products at a time; their merged matrix, one of the layer's size, is cut to a rank in the end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, placement, precision, rows as core
from jaxsub.linalg import gram as grams, pairs, products, svd

EXACT = 2048  # shorter side up to which all singular values of a merged matrix are found
PASSES, OVERSAMPLE = 6, 32  # of the randomized decomposition of larger ones
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # share of an update's norm that factors in float32 lose anyway


@dataclasses.dataclass(frozen=True)
class Cut:
    """How far a merged update is cut: to `rank` at most, and to the rank that holds `energy`; 0 is no bound."""

    rank: int = 0
    energy: float = 0.0

    def rank_of(self, s, cap):
        """(rank, share of the norm lost) for singular values s, non-increasing."""
        squares = np.square(s, dtype=np.float64)
        left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # energy lost by stopping before each
        whole = left[0]
        if not whole > 0:
            return 0, 0.0
        allowed = max(ROUNDING**2, 1.0 - self.energy if self.energy else 0.0) * whole
        rank = int(np.argmax(left <= allowed))
        rank = min(rank, cap, self.rank or rank)
        return rank, float(np.sqrt(left[rank] / whole))


class LoraRows(core.Rows):
    """Low-rank updates of one layer."""

    def __init__(self, a, b, scales, name="", model_ids=(), *, shape=(), cut=None, **more):
        """Takes factors as `reading.read_factors` gives them.

        Args:
            a: (N, r, i) float32 or float64; mixed ranks padded with zeros.
            b: (N, o, r).
            scales: (N,).
            name, model_ids: as in `ArrayRows`.
            shape: of one weight, where it is not (o, i): a convolution.
            cut: Cut of results.
            more: see `Rows`.
        """
        a, b = np.asarray(a), np.asarray(b)
        ids = model_ids or tuple(map(str, range(len(a))))
        super().__init__(name, (b.shape[1], a.shape[2]), ids, is_update=True, dtype=a.dtype.name, **more)
        self.scales, self.unscaled = np.asarray(scales, np.float64), (a, b)
        self.a, self.b = a, (b * self.scales[:, None, None]).astype(a.dtype)
        self.weight_shape, self.cut = tuple(shape) or self.shape, cut or Cut()
        self.chunk = self.shape[1]
        self.height = max(1, min(self.shape[0], core.BLOCK_BYTES // (len(a) * self.chunk * self.dtype.itemsize)))
        self.width = self.height * self.chunk
        self.ranks = _ranks(a, b, scales)

    def factors(self):
        """See `Rows`."""
        return self.a, self.b

    def blocks(self):
        """Whole rows of the updates, as many as a block holds."""
        (o, i), height = self.shape, self.height
        with jax.enable_x64(True):
            for row in range(0, o, height):
                part = self.b[:, row : row + height]
                count = part.shape[1] * i
                part = np.pad(part, ((0, 0), (0, height - part.shape[1]), (0, 0)))
                x = np.asarray(_multiplied(jnp.asarray(part), jnp.asarray(self.a)))
                yield core.Block(row * i, count, x, None)

    def matrix(self, n):
        """See `Rows`."""
        with jax.enable_x64(True):
            return products.matmul(jnp.asarray(self.b[n]), jnp.asarray(self.a[n]))

    def gram(self):
        """See `Rows`; from the factors."""
        mesh = placement.make_mesh(1, is_local=True)
        wide = sum(self.shape) * (self.num_models * self.a.shape[1]) ** 2
        dtype = precision.compute_dtype(self.dtype.name, wide)
        with jax.enable_x64(True):
            bt = np.ascontiguousarray(self.b.transpose(0, 2, 1))
            deal = pairs.Deal.create(self.num_models, self.a.shape[1])
            return deal.assemble(np.asarray(grams.lora_gram(self.a, bt, deal=deal, mesh=mesh, dtype=dtype).gram))

    def combination(self, coefficients):
        """See `Rows`: the factors side by side, cut to rank."""
        c = np.asarray(coefficients, np.float64)
        used = np.flatnonzero(c)
        if not used.size:
            return core.Factors(np.zeros((0, self.shape[1])), np.zeros((self.shape[0], 0)))
        a = self.a[used].reshape(-1, self.shape[1])
        b = (self.b[used] * c[used][:, None, None]).transpose(1, 0, 2).reshape(self.shape[0], -1)
        return self.of_factors(a, b)

    def of_factors(self, a, b):
        """Factors of b @ a, (k, i) and (o, k), cut to rank."""
        return cut_product(a, b, self.cut, self._cap())

    def map(self, kernel, *arguments):
        """See `Rows`: the merged matrix is formed, and cut to rank."""
        return self.result(np.concatenate([part for _, part in self._mapped(kernel, arguments)]))

    def map_beside(self, kernel, *arguments):
        """See `Rows`: as `map`."""
        return self.result(np.concatenate([part for _, part in self._mapped(kernel, arguments, self.statistics)]))

    def times_right(self, n, right, found=None):
        """See `Rows`: of the right factors alone."""
        return [*(found or ()), (np.asarray(products.matmul(jnp.asarray(self.a[n]).astype(right.dtype), right)), n)]

    def summed(self, found):
        """See `Rows`: the factors side by side, cut to rank."""
        a = np.concatenate([a for a, _ in found])
        return self.of_factors(a, np.concatenate([self.b[n] for _, n in found], axis=1))

    def result(self, array):
        """See `Rows`: cut to rank."""
        return cut_matrix(np.asarray(array).reshape(self.shape), self.cut, self._cap(), self.name)

    def _cap(self):
        """The rank that all models have together: a result has no more unless the user asks for it."""
        return max(self.cut.rank, min(*self.shape, int(self.ranks.sum())))


def _ranks(a, b, scales):
    """(N,) columns that are not zero."""
    used = (np.abs(a).max(axis=2) > 0) & (np.abs(b).max(axis=1) > 0) & (np.asarray(scales) != 0)[:, None]
    return used.sum(axis=1)


@jax.jit
def _multiplied(b, a):
    x = products.einsum("nor,nri->noi", b, a)
    return products.row_major(x.reshape(x.shape[0], -1))


def cut_product(a, b, cut, cap):
    """Factors of b @ a, (k, i) and (o, k), cut; the error is exact, from singular values of a small core."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    left, inner = np.linalg.qr(b)
    right, outer = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(inner @ outer.T, full_matrices=False)
    rank, error = cut.rank_of(s, cap)
    root = np.sqrt(s[:rank])
    return core.Factors((root[:, None] * vt[:rank]) @ right.T, (left @ u[:, :rank]) * root, error)


def cut_matrix(x, cut, cap, name):
    """Factors of a matrix (o, i), cut; of large ones by a randomized decomposition, whose error is measured."""
    if not np.isfinite(x).all():
        raise errors.InputError(name, "the merged update is not finite", rule="N1")
    if min(x.shape) <= EXACT:
        u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        rank, error = cut.rank_of(s, cap)
    else:
        rank = min(cap, cut.rank or cap, min(x.shape))
        with jax.enable_x64(True):
            key = jax.random.key(0)  # of the test matrix: the error is measured, whatever is drawn
            found = svd.randomized_svd(jnp.asarray(x), key, rank=rank, oversample=OVERSAMPLE, passes=PASSES)
        u, s, vt = (np.asarray(part, np.float64) for part in (found.u, found.s, found.vt))
        whole = float(found.energy)
        tail = max(float(found.tail), 0.0)
        rank, lost = cut.rank_of(s, rank)
        kept = float(np.square(s).sum())
        error = float(np.sqrt((lost**2 * kept + tail) / whole)) if whole > 0 else 0.0
    root = np.sqrt(s[:rank])
    return core.Factors(root[:, None] * vt[:rank], u[:, :rank] * root, error)
