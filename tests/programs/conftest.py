"""Layers by NumPy, for tests of what is kept, lost and done again."""

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.pipelines import fit_layer, layers


@pytest.fixture
def quick(monkeypatch):
    """Layers by NumPy: what is kept and done again does not hang on the kernels, which take seconds to compile."""
    from jaxsub import bundle, formats, reading, statistics, subspace

    def rows_of(group, models):
        pairs = enumerate(zip(models, group.entries, strict=True))
        found = [reading.require_finite(formats.read(m, t), i, m, t) for i, (m, t) in pairs]
        return np.stack(found).reshape(len(found), -1).astype(np.float64)

    def statistics_of(group, models, mesh, options, *, ahead=None, base=None, meter=None):
        x, ids = rows_of(group, [m for _, m in models]), [i for i, _ in models]
        found = statistics.Statistics.empty(group.name, group.shape, "dense", ids, "float32", "float64")
        mean = x.mean(0)
        found.gram, found.cross, found.mean_square = (x - mean) @ (x - mean).T, (x - mean) @ mean, float(mean @ mean)
        found.row_sums, found.row_fourths = x.sum(1), np.square(np.square(x)).sum(1)
        meter.bytes_read += group.num_bytes
        return found

    def fit_of(group, opened, config, rank):
        rank = rank[0] if isinstance(rank, tuple) else rank
        if rank > 9:
            raise errors.ConfigError(f"rank={rank}")
        x = rows_of(group, [opened.models[m] for m in group.members])
        mean = x.mean(0)
        _, s, rows = np.linalg.svd(x - mean, full_matrices=False)
        space = subspace.LinearSubspace(
            mean.astype("f4"),
            rows[:rank].astype("f4"),
            subspace.Spectrum(s, float(np.square(s).sum()), 0.0),
            group.shape,
            subspace.Procedure("gram", ("models",), "models", len(x) - 1),
            subspace.Certificate(0.1, 0.2, exact=True, passes=1),
        )
        ids, values = tuple(opened.refs[m].id for m in group.members), ((x - mean) @ rows[:rank].T).astype("f4")
        figures = {"energy_kept": 0.5, "held_out": None, "error_mean": 0.1, "error_max": 0.1}
        return bundle.Layer(group.name, space, ids, values, fit_layer.stored_dtypes(group), figures)

    monkeypatch.setattr(layers, "statistics", statistics_of)
    monkeypatch.setattr(fit_layer, "fit", fit_of)
