"""Principal components of a stream of models, a batch at a time; twice as many rows kept as components wanted."""

import dataclasses

import jax
import numpy as np

from jaxsub import placement
from jaxsub.linalg import collectives, incremental
from jaxsub.workloads import _data, _peers

REFERENCE = "Levy and Lindenbaum 2000; Ross et al. 2008"


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the stream."""

    models: int = 256
    features: int = 2**18
    batch: int = 32
    rank: int = 32


QUICK = Options(models=128, features=2**14)


def problem(options, rng):
    """Rows with a known decaying spectrum above a floor and a mean 30 times the first direction's share."""
    return _data.stack(rng, options.models, options.features)


def work(options):
    """(operations, bytes): a half Gram product of state and batch, and the mixing of the new state, each update."""
    kept, updates = 2 * options.rank, options.models // options.batch
    rows = kept + options.batch + 1
    return updates * (rows**2 + 2 * kept * rows) * options.features, updates * 4 * (2 * rows + kept) * options.features


def communication(options):
    """A Gram matrix each update, and what turns the state into components at the end."""
    kept, updates = 2 * options.rank, options.models // options.batch
    each = collectives.incremental_update(kept, options.batch)
    return each * updates + collectives.incremental_finish(kept, options.rank)


def ours(x, options):
    """A call that computes (s (k,), basis (k, D))."""
    mesh = placement.make_mesh()
    starts = range(0, options.models, options.batch)
    batches = [_data.place(x[j : j + options.batch].copy(), mesh) for j in starts]

    def call():
        with jax.enable_x64(True):
            stream = incremental.start(options.features, rows=2 * options.rank, dtype="float32")
            for batch in batches:
                stream = incremental.update(stream, batch, mesh=mesh)
            found = incremental.finish(stream, rank=options.rank, mesh=mesh)
            return found.singular_values, found.basis

    return call


def peers(x, options):
    """scikit-learn's IncrementalPCA, which keeps as many rows as it returns."""
    if not _peers.sklearn():
        return {}
    from sklearn.decomposition import IncrementalPCA

    def by_sklearn():
        fitted = IncrementalPCA(n_components=options.rank)
        for j in range(0, options.models, options.batch):
            fitted.partial_fit(x[j : j + options.batch])
        return fitted.singular_values_, fitted.components_

    return {"scikit-learn IncrementalPCA": by_sklearn}


def error(x, options, result):
    """Sine of the largest angle between the span of the basis and the exact one, from float64."""
    s, vectors = _data.leading(_data.gram(x), options.rank)
    mean = x.mean(0, dtype=np.float64)
    exact = np.concatenate(
        [(vectors / s).T @ (x[:, i : i + 65536] - mean[i : i + 65536]) for i in range(0, x.shape[1], 65536)],
        axis=1,
    )
    return _data.angle(exact.T, np.asarray(result[1]).T)
