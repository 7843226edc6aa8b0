"""The two products of a pass of a randomized SVD, in the order that is fast; the other order stands among the peers."""

import jax
import numpy as np

from jaxsub.linalg import collectives, products, range_finder
from jaxsub.workloads import _peers, randomized_svd

REFERENCE = "Goto and van de Geijn 2008: a product is as fast as its operands lie in memory"
Options, QUICK = randomized_svd.Options, randomized_svd.QUICK


def problem(options, rng):
    """(x (N, D), y (N, l), z (l, D)) float32."""
    size = options.rank + options.oversample
    shapes = ((options.rows, options.columns), (options.rows, size), (size, options.columns))
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def work(options):
    """(operations, bytes) of both products, one read of x each."""
    flops, num_bytes = randomized_svd.work(options)
    return 2 * flops // options.passes, 2 * num_bytes // options.passes


def communication(options):
    """The product that contracts the sharded columns; the other one stays where it is."""
    return collectives.times_tests(options.rows, options.rank + options.oversample)


def ours(operands, options):
    """A call that computes (y.T x (l, D), x z.T (N, l))."""
    return _both(operands, lambda x, y, z: (range_finder.tests_times(y, x), range_finder.times_tests(x, z)))


def peers(operands, options):
    """The same in JAX with the long side turned; NumPy; torch."""

    def turned(x, y, z):
        return products.matmul(x.T, y), products.matmul(z, x.T)

    x, y, z = operands
    # Turned back on the host: inside the program XLA would turn the products themselves.
    run = _both(operands, turned)
    found = {"jax, x.T @ y and z @ x.T": lambda: tuple(np.asarray(p).T for p in run())}
    found["numpy"] = lambda: (y.T @ x, x @ z.T)
    if _peers.torch():
        import torch

        tx, ty, tz = map(torch.from_numpy, operands)
        found["torch"] = lambda: tuple(p.numpy() for p in (ty.T @ tx, tx @ tz.T))
    return found


def _both(operands, products_of):
    placed, run = jax.device_put(operands), jax.jit(products_of)
    return lambda: run(*placed)


def error(operands, options, result):
    """Largest error of an entry among the first 64 of each product, relative to the largest entry."""
    x, y, z = (a.astype(np.float64) for a in operands)
    exact = y.T @ x[:, :64], x[:64] @ z.T
    found = np.asarray(result[0])[:, :64], np.asarray(result[1])[:64]
    return max(float(np.abs(f - e).max() / np.abs(e).max()) for f, e in zip(found, exact, strict=True))
