"""Networks on digits, one start, each on its own random half of the classes."""

from jaxsub.worlds import _digits

DESCRIPTION = "Networks on digits, one start, each on its own random half of the classes."
TRUTH = {"verdict": "shared", "flags": ["one_lineage"], "layers": list(_digits.KERNELS)}
Options = _digits.Options
evaluation = _digits.evaluation


def make(options, seed, folder):
    """Writes the world to `folder`; see `_digits.make`."""
    _digits.make(options, seed, folder, same_start=True, split_task=True)
