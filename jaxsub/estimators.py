"""The kernels for people who hold arrays, in scikit-learn's words: fit, transform, inverse_transform.

    GramPCA        exact, through the smaller Gram matrix
    RandomizedPCA  a few passes, no Gram matrix
    Tucker         rows are tensors of one shape; each axis of it reduced

scikit-learn itself is not needed; where it is installed they are estimators of its kind (clone, pipelines, searches).
Collections of models on disk are for `jaxsub.analyze`, which reads them block by block.
"""

import inspect
import math
import numbers

import jax
import numpy as np

from jaxsub import hostmemory, precision
from jaxsub.linalg import svd, tucker, unfold

RESOLVED = 1e-3  # share of the energy that float32 tells by a difference of sums of squares; float64 its square
PIECE = 2**20  # float64 entries of a residual that are made at a time


class _Estimator:
    """Parameters as scikit-learn expects them, and the checks of input that its estimators make."""

    def get_params(self, deep=True):
        """The constructor's arguments."""
        del deep
        return {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }

    def set_params(self, **parameters):
        """Sets constructor arguments; returns self."""
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid: {sorted(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self):
        given = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({given})"

    def __sklearn_tags__(self):
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self):
        return hasattr(self, "mean_")

    def fit_transform(self, X, y=None):  # noqa: N803
        """fit(X).transform(X)."""
        return self.fit(X, y).transform(X)

    def _rows(self, X, *, least=1):  # noqa: N803
        """X as a finite (n, D) array of float32 or float64."""
        if hasattr(X, "toarray") and hasattr(X, "nnz"):
            raise TypeError("Sparse data was passed, but dense data is required. Use X.toarray().")
        x = np.asarray(X)
        if np.iscomplexobj(x):
            raise ValueError("Complex data not supported")
        if x.dtype != np.float32:
            x = x.astype(np.float64)
        if x.ndim != 2:
            raise ValueError(
                f"Expected 2D array, got {x.ndim}D array instead. Reshape your data with X.reshape(n, -1)."
            )
        if len(x) < least:
            raise ValueError(
                f"Found array with {len(x)} sample(s) (shape={x.shape}) while a minimum of {least} is required."
            )
        if x.shape[1] < 1:
            raise ValueError(f"Found array with 0 feature(s) (shape={x.shape}) while a minimum of 1 is required.")
        if not np.isfinite(x).all():
            what = "NaN" if np.isnan(x).any() else f"infinity or a value too large for {x.dtype}"
            raise ValueError(f"Input X contains {what}.")
        return x

    def _seen(self, X):  # noqa: N803
        """Rows to transform: of as many features as were fitted."""
        self._require_fitted()
        x = self._rows(X)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        return x

    def _require_fitted(self):
        if not self.__sklearn_is_fitted__():
            try:
                from sklearn.exceptions import NotFittedError as error
            except ImportError:
                error = ValueError
            raise error(f"This {type(self).__name__} instance is not fitted yet. Call 'fit' first.")


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _is_count(value, most):
    """Whether it is a whole number from 1 to `most`, of a type that is one: 1.0 is a share that cannot be meant."""
    return _is_number(value) and isinstance(value, numbers.Integral) and 1 <= value <= most


class _PCA(_Estimator):
    """What a fitted PCA does, however its components were found."""

    def fit(self, X, y=None):  # noqa: N803
        """Finds mean and components of the rows of X (n, D), n >= 2; returns self.

        Sets mean_ (D,), components_ (k, D), singular_values_ (k,), explained_variance_ (k,),
        explained_variance_ratio_ (k,), n_components_, n_samples_, n_features_in_, relative_error_.
        """
        del y
        x = self._rows(X, least=2)
        mean, centred, power = _centred(x)
        with jax.enable_x64(True), hostmemory.one_blas_thread(min(x.shape)):
            s, components, energy = self._decompose(centred)
        self.mean_ = mean.astype(x.dtype)
        self.components_ = components.astype(x.dtype)
        self.singular_values_ = np.ldexp(s, power)
        with np.errstate(over="ignore"):  # as much as the dtype can say of it
            self.explained_variance_ = np.square(self.singular_values_) / (len(x) - 1)
        if hasattr(self, "noise_floor_"):
            self.noise_floor_ = float(np.ldexp(self.noise_floor_, power))
        self.explained_variance_ratio_ = np.square(s) / energy if energy > 0 else np.zeros(len(s))
        self.n_components_ = len(s)
        self.n_samples_, self.n_features_in_ = x.shape
        left = max(1.0 - float(self.explained_variance_ratio_.sum()), 0.0)
        self.relative_error_ = self._error(centred, components, left) if energy > 0 else 0.0
        return self

    def _error(self, x, components, left):
        """Relative error of centred rows in these components, whose values leave a share of the energy."""
        return math.sqrt(left)

    def transform(self, X):  # noqa: N803
        """Coefficients (n, k) of rows, (X - mean_) @ components_.T."""
        x = self._seen(X)
        return ((x - self.mean_) @ self.components_.T).astype(x.dtype)

    def inverse_transform(self, X):  # noqa: N803
        """Rows (n, D) from coefficients, mean_ + X @ components_."""
        self._require_fitted()
        return self._rows(X) @ self.components_ + self.mean_


def _centred(x):
    """(mean in float64, rows minus it times 2**-power, power), squares of which no dtype has to fear."""
    mean = x.mean(axis=0, dtype=np.float64)
    centred = x - mean
    centred -= centred.mean(axis=0)  # what rounding left of the mean, the same in all rows
    centred = centred.astype(x.dtype)
    power = precision.exponent_of(precision.largest(centred))
    return mean, np.ldexp(centred, -power) if power else centred, power


class GramPCA(_PCA):
    """Principal components through the Gram matrix of the shorter side; exact down to `noise_floor_`.

    Args:
        n_components: components kept; a float in (0, 1) keeps the fewest that hold this share of the variance; None
            keeps all above the floor.

    Singular values under `noise_floor_` are rounding and have no components, see `linalg.svd.gram_svd`.
    """

    def __init__(self, n_components=None):
        self.n_components = n_components

    def _decompose(self, x):
        cap = min(len(x) - 1, x.shape[1])
        wanted = self.n_components
        if wanted is not None and not (_is_number(wanted) and 0 < wanted < 1) and not _is_count(wanted, cap):
            raise ValueError(f"n_components={wanted!r}: a share in (0, 1) or 1 to {cap} for X of shape {x.shape}")
        rank = min(cap, x.shape[0], x.shape[1]) if wanted is None or wanted < 1 else int(wanted)
        found = svd.gram_svd(x, rank=rank, dtype="float64")
        self.noise_floor_ = float(found.floor)
        values, energy = np.asarray(found.s, np.float64), float(found.energy)
        if wanted is None:
            rank = max(1, int(np.sum(values[:rank] > self.noise_floor_)))
        elif wanted < 1:
            shares = np.cumsum(np.square(values)) / energy if energy > 0 else np.ones(len(values))
            rank = min(rank, int(np.searchsorted(shares, wanted)) + 1)
        return values[:rank], np.asarray(found.vt)[:rank], energy


class RandomizedPCA(_PCA):
    """Principal components from a few products with random vectors; for many rows and many features.

    Args:
        n_components: components kept.
        oversample: random vectors beyond these.
        passes: products of X with them, at least 2.
        random_state: seed.
    """

    def __init__(self, n_components=2, oversample=16, passes=4, random_state=0):
        self.n_components = n_components
        self.oversample = oversample
        self.passes = passes
        self.random_state = random_state

    def _decompose(self, x):
        cap = min(x.shape)
        if not _is_count(self.n_components, cap):
            raise ValueError(f"n_components={self.n_components!r}: 1 to {cap} for X of shape {x.shape}")
        found = svd.randomized_svd(
            x,
            jax.random.key(self.random_state or 0),
            rank=int(self.n_components),
            oversample=self.oversample,
            passes=self.passes,
        )
        return np.asarray(found.s, np.float64), np.asarray(found.vt), float(found.energy)

    def _error(self, x, components, left):
        """By the residual itself where float32 does not resolve what its sums of squares leave."""
        if left > RESOLVED or x.dtype == np.float64 and left > RESOLVED**2:
            return math.sqrt(left)
        v, missed, whole = np.asarray(components, np.float64), 0.0, 0.0
        step = max(1, PIECE // x.shape[1])
        for start in range(0, len(x), step):
            rows = x[start : start + step].astype(np.float64)
            missed += float(np.square(rows - (rows @ v.T) @ v).sum())
            whole += float(np.square(rows).sum())
        return math.sqrt(missed / whole)


class Tucker(_Estimator):
    """Rows are tensors of `shape`; each axis is reduced to the leading directions of the centred stack (ST-HOSVD).

    Args:
        shape: shape of one row; (D,) by default.
        ranks: one for each axis of `shape`; None lets `energy` choose.
        energy: share of its energy that each axis keeps.
    """

    def __init__(self, shape=None, ranks=None, energy=0.9):
        self.shape = shape
        self.ranks = ranks
        self.energy = energy

    def fit(self, X, y=None):  # noqa: N803
        """Finds mean and factors; sets mean_ (D,), factors_ (one (k_m, d_m) an axis), relative_error_; returns self."""
        del y
        x = self._rows(X, least=2)
        shape = tuple(self.shape) if self.shape is not None else (x.shape[1],)
        if math.prod(shape) != x.shape[1]:
            raise ValueError(f"shape={shape}: rows have {x.shape[1]} features")
        mean, stack, _ = _centred(x)
        stack = stack.reshape(len(x), *shape)
        if self.ranks is not None and not (len(self.ranks) == len(shape) and all(map(_is_count, self.ranks, shape))):
            raise ValueError(f"ranks={self.ranks!r}: one for each axis of {shape}, from 1 to its size")
        rule = {"energy": self.energy} if self.ranks is None else {"ranks": (None, *map(int, self.ranks))}
        if self.ranks is None:
            rule["axes"] = tuple(range(1, stack.ndim))
        with jax.enable_x64(True), hostmemory.one_blas_thread(max(stack.shape)):
            found = tucker.sthosvd(stack, dtype="float64", **rule)
            self.factors_ = [np.asarray(f, x.dtype) for f in found.factors[1:]]
            self.relative_error_ = float(found.error)
        self.mean_, self.n_features_in_, self.shape_ = mean.astype(x.dtype), x.shape[1], shape
        return self

    def transform(self, X):  # noqa: N803
        """Cores (n, k_1 k_2 ...) of rows, flattened in C order."""
        x = self._seen(X)
        return self._products((x - self.mean_).reshape(len(x), *self.shape_), self.factors_).astype(x.dtype)

    def inverse_transform(self, X):  # noqa: N803
        """Rows (n, D) from flattened cores."""
        self._require_fitted()
        c = self._rows(X)
        core = c.reshape(len(c), *(len(f) for f in self.factors_))
        return self._products(core, [f.T for f in self.factors_]) + self.mean_

    def _products(self, tensor, factors):
        with jax.enable_x64(True):
            out = unfold.mode_products(tensor.astype(factors[0].dtype), (None, *factors))
            return np.asarray(out).reshape(len(tensor), -1)
