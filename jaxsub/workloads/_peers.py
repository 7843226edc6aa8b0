"""Which peers are installed; they run with as many threads as XLA has cores."""

import importlib.util
import os

import numpy as np


def sklearn():
    """Whether scikit-learn can be imported."""
    return importlib.util.find_spec("sklearn") is not None


def tensorly():
    """Whether tensorly can be imported."""
    return importlib.util.find_spec("tensorly") is not None


def pyttb():
    """Whether pyttb can be imported."""
    return importlib.util.find_spec("pyttb") is not None


def torch():
    """Whether torch can be imported; sets its threads."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return True


def randomized_pca(x, rank):
    """A call of scikit-learn's randomized PCA of the rows: (coefficients (N, k), s (k,), directions (k, D))."""
    from sklearn.decomposition import PCA

    def call():
        fitted = PCA(rank, svd_solver="randomized", random_state=0)
        coefficients = fitted.fit_transform(x)
        return coefficients, fitted.singular_values_, fitted.components_

    return call


def tucker(x, ranks):
    """Name -> call that computes (core, factors (k, d)) of a Tucker decomposition by an installed peer."""
    found = {}
    if torch():
        found["torch by hand, Gram and eigh"] = _torch_sthosvd(x, ranks)
    if torch() and tensorly():
        import tensorly as tl
        import torch as t
        from tensorly.decomposition import tucker as decompose

        tensor = t.from_numpy(x)

        def by_tensorly():
            with tl.backend_context("pytorch", local_threadsafe=True):
                core, factors = decompose(tensor, rank=list(ranks), n_iter_max=1, init="svd", svd="randomized_svd")
            return core.numpy(), [f.numpy().T for f in factors]

        found["tensorly on torch"] = by_tensorly
    if pyttb():
        import pyttb as ttb

        holder = ttb.tensor(np.asfortranarray(x))

        def by_pyttb():
            fitted = ttb.hosvd(holder, 0.0, ranks=list(ranks), verbosity=0)
            return fitted.core.data, [f.T for f in fitted.factor_matrices]

        found["pyttb.hosvd"] = by_pyttb
    return found


def _torch_sthosvd(x, ranks):
    import torch as t

    tensor = t.from_numpy(x)

    def call():
        core, factors = tensor, []
        for axis, rank in enumerate(ranks):
            unfolded = core.movedim(axis, 0).reshape(core.shape[axis], -1)
            factor = t.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)[:, :rank].T
            factors.append(factor)
            moved = factor @ unfolded
            core = moved.reshape(rank, *core.movedim(axis, 0).shape[1:]).movedim(0, axis)
        return core.contiguous().numpy(), [f.numpy() for f in factors]

    return call
