"""What one pass over a layer leaves behind: small float64 arrays from which every figure is computed.

    rows x_n = s + y_n,  s close to their mean:   gram = y y.T,  cross = y s,  mean_square = s s
    uncentred <x_i, x_j> = gram_ij + cross_i + cross_j + mean_square;   centred = H gram H

All are stored for weights times 2**-exponent, so that no square over- or underflows.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np

from jaxsub import errors, formats, precision, solvers, spectrum
from jaxsub.formats import safetensors

SCHEMA = "jaxsub.statistics/1"
QR_ENTRIES = 2**21  # float64 numbers factorised at once, 16 MiB
KEPT_ENTRIES = 2**17  # of a stack with heavy tails, of which all entries are kept: see `keep`
HEAVY = 0.3  # excess kurtosis of two models' inner product, over random orders of their entries, from which tails count


@dataclasses.dataclass(frozen=True)
class ModeEnergies:
    """Energies along one weight axis, non-increasing, of `total`; `columns` is the sketch's width, 0 if exact."""

    axis: int
    size: int
    values: np.ndarray
    total: float
    columns: int = 0
    centred: bool = True


@dataclasses.dataclass
class Statistics:
    """Sums over the features of one layer's stack of N models; see the module docstring.

    `add` takes further blocks of the same models; `merge` adds another device's or host's features.
    """

    name: str
    shape: tuple[int, ...]
    parametrisation: str
    model_ids: tuple[str, ...]
    storage: str
    dtype: str
    gram: np.ndarray
    cross: np.ndarray
    mean_square: float
    row_sums: np.ndarray
    row_fourths: np.ndarray
    variance_squares: float
    deviation_fourths: float
    exponent: int = 0
    modes: tuple[ModeEnergies, ...] = ()
    model_singular_values: np.ndarray | None = None
    ranks: np.ndarray | None = None
    b_overlap: np.ndarray | None = None
    b_norms: np.ndarray | None = None
    a_cosines: np.ndarray | None = None
    factor: np.ndarray | None = None  # (N, N) R of the QR factorisation of y.T, for float64 weights: R.T R = gram
    a_width: int | None = None
    roundings: np.ndarray | None = None  # (N,) relative rounding error of each model's stored dtype
    base_norm: float = 0.0  # norm of the base that was subtracted, unscaled
    entries: np.ndarray | None = None  # (N, D) float16, rows of norm sqrt(D): all entries, where few carry much
    digest: str = ""

    @classmethod
    def empty(cls, name, shape, parametrisation, model_ids, storage, dtype):
        """Statistics of zero features."""
        n = len(model_ids)
        return cls(
            name=name,
            shape=tuple(shape),
            parametrisation=parametrisation,
            model_ids=tuple(model_ids),
            storage=storage,
            dtype=dtype,
            gram=np.zeros((n, n)),
            cross=np.zeros(n),
            mean_square=0.0,
            row_sums=np.zeros(n),
            row_fourths=np.zeros(n),
            variance_squares=0.0,
            deviation_fourths=0.0,
        )

    @property
    def num_models(self):
        """N."""
        return len(self.model_ids)

    @property
    def num_features(self):
        """D, entries of one model in this layer."""
        return math.prod(self.shape)

    @property
    def scale(self):
        """What a norm in these units is multiplied by to get the weights' own units."""
        return float(np.ldexp(1.0, self.exponent))

    def add(self, sums, exponent=0):
        """Adds a block's DenseSums, computed on weights times 2**-exponent. Powers of two: exact."""
        step = exponent - self.exponent
        if not self.gram.any() and not self.mean_square:
            self.exponent, step = exponent, 0
        if step > 0:
            self._rescale(exponent)
            step = 0
        for name, power in _SUMS:
            setattr(self, name, getattr(self, name) + np.ldexp(np.asarray(getattr(sums, name)), power * step))

    def merge(self, other):
        """Adds the sums over other features of the same models."""
        if other.model_ids != self.model_ids:
            raise ValueError("statistics of different models cannot be merged over features")
        factors = [s.factor for s in (self, other)]
        if all(f is not None for f in factors):
            self.add(other, other.exponent)
            rescaled = np.ldexp(factors[1], other.exponent - self.exponent)
            self.factor = np.linalg.qr(np.concatenate([self.factor, rescaled]), mode="r")
        else:
            self.add(other, other.exponent)

    def add_factor(self, x, exponent):
        """Adds float64 weights x (N, columns) times 2**-exponent, centred here, to the QR factor; call after `add`.

        A Gram matrix squares the condition number, which float64 weights cannot spare: their singular values come from
        this factor (TSQR, Demmel et al. 2012), with noise at N eps instead of sqrt(N eps).
        """
        columns = max(4 * len(x), QR_ENTRIES // len(x))
        for start in range(0, x.shape[1], columns):  # in pieces: LAPACK copies what it factorises
            part = x[:, start : start + columns]
            part = np.ldexp(part - part.mean(axis=0), exponent - self.exponent).T
            part = part if self.factor is None else np.concatenate([self.factor, part])
            self.factor = np.linalg.qr(part, mode="r")

    def centred_energies(self):
        """(N,) squared singular values of the centred rows, non-increasing."""
        if self.factor is None:
            return spectrum.energies(self.centred())
        values = solvers.singular_values(self.factor - self.factor.mean(axis=1, keepdims=True))
        return np.pad(np.square(values), (0, max(0, self.num_models - len(values))))

    def _rescale(self, exponent):
        if self.factor is not None:
            self.factor = np.ldexp(self.factor, self.exponent - exponent)
        for name, power in _SUMS:
            setattr(self, name, np.ldexp(getattr(self, name), power * (self.exponent - exponent)))
        self.exponent = exponent

    def centred(self):
        """(N, N) Gram matrix of the rows minus their mean."""
        return spectrum.centred(self.gram)

    def uncentred(self):
        """(N, N) Gram matrix of the rows; zero for rows that are `lost`, of which only rounding would be left."""
        gram, kept = self._whole(), ~self.lost()
        return gram if kept.all() else np.where(kept[:, None] & kept[None, :], gram, 0.0)

    def _whole(self):
        return self.gram + self.cross[:, None] + self.cross[None, :] + self.mean_square

    def lost(self):
        """(N,) bool, rows that are zero or so small beside the mean that their norm is rounding."""
        parts = np.sqrt(np.maximum(np.diag(self.gram), 0.0) + self.mean_square)
        if self.parametrisation == "lora":  # nothing was taken off
            parts = np.zeros(self.num_models)
        return np.diag(self._whole()) <= precision.gram_floor(parts, self.num_models, self.dtype) ** 2

    def kurtosis(self):
        """(N,) fourth moments of the rows' entries over their squared second moments; NaN where not known."""
        squares = np.square(np.diag(self.uncentred()))
        fourths = self.num_features * self.row_fourths
        return np.divide(fourths, squares, out=np.full(self.num_models, np.nan), where=squares > 0)

    def tails(self):
        """Excess kurtosis K^2 / D that two rows' inner product has over random orders of their entries; 0 if unknown.

        Where it is large, a few entries carry a model, and two models agree as soon as two of these meet.
        """
        known = self.kurtosis()
        known = known[np.isfinite(known)]
        return float(np.mean(known)) ** 2 / self.num_features if len(known) else 0.0

    def is_heavy(self):
        """Whether a few entries carry so much of a model that nulls must count with it."""
        return self.tails() > HEAVY

    def keep(self, x):
        """Keeps the entries x (N, D) of a small stack with heavy tails, for nulls that permute them."""
        rows = np.asarray(x, np.float64)
        norms = np.sqrt(np.square(rows).sum(1, keepdims=True))
        unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
        self.entries = (unit * math.sqrt(self.num_features)).astype(np.float16)

    def zero(self):
        """(N,) bool, rows that are zero throughout: told from small ones by sums that are of each row alone."""
        return self.lost() & (self.row_sums == 0) & ~(self.row_fourths > 0)

    def norms(self):
        """(N,) Euclidean norms of the rows."""
        return np.sqrt(np.maximum(np.diag(self.uncentred()), 0.0))

    def floor(self, largest):
        """Singular values under this are noise of the arithmetic or of the stored dtype, in scaled units."""
        if self.factor is not None:
            arithmetic = precision.factor_floor(largest, self.num_models)
        elif self.parametrisation == "lora":
            # Products of factors are not centred before they are made: their rounding is relative to the updates.
            whole = float(np.sqrt(max(solvers.eigvalsh(self.uncentred())[-1], 0.0)))
            arithmetic = precision.gram_floor(whole, self.num_models, self.dtype)
        else:
            arithmetic = precision.gram_floor(largest, self.num_models, self.dtype)
        roundings = precision.rounding(self.storage) if self.roundings is None else self.roundings
        stored = self.norms() + self.base_norm / self.scale if self.base_norm else self.norms()
        return max(arithmetic, precision.storage_floor(stored, self.num_features, roundings))

    def save(self, path):
        """Writes one safetensors file, atomically."""
        arrays = {n: np.asarray(getattr(self, n), np.float64) for n in _ARRAYS if getattr(self, n) is not None}
        if self.entries is not None:
            arrays["entries"] = self.entries
        for mode in self.modes:
            arrays[f"mode_{mode.axis}"] = mode.values
        described = [{**dataclasses.asdict(m), "values": None} for m in self.modes]
        record = {n: getattr(self, n) for n in _FIELDS} | {"modes": described, "schema": SCHEMA}
        record["content"] = _content(record, arrays)
        safetensors.write(str(path), arrays, {"jaxsub": json.dumps(record, sort_keys=True)})

    @classmethod
    def load(cls, path):
        """Statistics from a file written by `save`.

        Raises:
            InputError: if the file is damaged or not of this schema.
        """
        model = formats.open_model(str(path))
        try:
            record = json.loads(model.metadata["jaxsub"])
            if record.pop("schema") != SCHEMA:
                raise ValueError("unknown schema")
            arrays = {n: formats.read(model, t) for n, t in model.tensors.items()}
            if record.pop("content") != _content({**record, "schema": SCHEMA}, arrays):
                raise ValueError("other numbers than were written")
            modes = tuple(ModeEnergies(**{**m, "values": arrays[f"mode_{m['axis']}"]}) for m in record.pop("modes"))
            record["shape"], record["model_ids"] = tuple(record["shape"]), tuple(record["model_ids"])
            fields = {n: arrays.get(n) for n in (*_ARRAYS, "entries")}
            for n in ("mean_square", "variance_squares", "deviation_fourths"):
                fields[n] = float(fields[n])
            return cls(**record, **fields, modes=modes)
        except (KeyError, TypeError, ValueError) as error:
            raise errors.InputError(path, f"not a statistics file of this version ({error})") from error


def _content(record, arrays):
    """sha256 of what a file of statistics says: a whole header says nothing of the numbers behind it."""
    whole = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(arrays):
        whole.update(name.encode() + np.asarray(arrays[name], order="C").tobytes())
    return whole.hexdigest()


# Additive sums and the power of the scale they carry.
_SUMS = (
    ("gram", 2),
    ("cross", 2),
    ("mean_square", 2),
    ("row_sums", 1),
    ("row_fourths", 4),
    ("variance_squares", 4),
    ("deviation_fourths", 4),
)
_ARRAYS = (
    *(n for n, _ in _SUMS),
    "model_singular_values",
    "ranks",
    "b_overlap",
    "b_norms",
    "a_cosines",
    "factor",
    "roundings",
)
_FIELDS = (
    "name",
    "shape",
    "parametrisation",
    "model_ids",
    "storage",
    "dtype",
    "exponent",
    "a_width",
    "base_norm",
    "digest",
)
