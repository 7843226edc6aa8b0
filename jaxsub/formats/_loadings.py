"""LoRA factors stored as a basis and loadings in it: A = (C L).T, B = C L, multiplied out when they are read.

What two families of files share: `subspaceadapter` (both parts in one file) and `lorashare` (one basis for all).
"""

import numpy as np

from jaxsub import descriptors, errors, precision
from jaxsub.formats import _model

SIDES = "AB"


class Products:
    """The factors of one model: their tensors, and how each is read.

    Attributes:
        load: for the Model, reads a factor by its name, and by the given `load` whatever is none.
    """

    def __init__(self, file, hint, load=None):
        self._file, self._hint, self._rest, self._parts = file, hint, load, {}

    def factor(self, name, layer, side, components, loadings):
        """The Tensor `name`, A (r, i) or B (o, r), of components (i or o, K) and loadings (K, r).

        Raises:
            InputError: parts that are no floats or do not fit each other (rules H6, H13).
        """
        for part in (components, loadings):
            _model.require_float(part, self._file)
        shapes = components.shape, loadings.shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0] or 0 in shapes[0] + shapes[1]:
            reason = f"has components {shapes[0]} and loadings {shapes[1]} of {side}, which do not fit"
            raise errors.InputError(self._file, reason, key=layer, hint=self._hint, rule="H13")
        dtype = precision.widest((components.dtype, loadings.dtype, "float32"))
        self._parts[name] = (components, loadings, side, dtype)
        shape = shapes[0][0], shapes[1][1]
        return descriptors.Tensor(name, shape[::-1] if side == "A" else shape, dtype)

    def load(self, name):
        if name not in self._parts:
            return self._rest(name)
        components, loadings, side, dtype = self._parts[name]
        # A product beyond the dtype is infinite, and sets the model aside as any weight that is not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            c, x = (_model.read(t, self._rest).astype(np.float64) for t in (components, loadings))
            product = (c @ x).astype(dtype)
        return np.ascontiguousarray(product.T if side == "A" else product)
