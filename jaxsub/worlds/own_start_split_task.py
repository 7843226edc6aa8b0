"""Networks on digits, own starts, each on its own random half of the classes."""

from jaxsub.worlds import _digits

DESCRIPTION = "Networks on digits, own starts, each on its own random half of the classes."
TRUTH = {"verdict": "chance", "flags": [], "layers": list(_digits.KERNELS)}
Options = _digits.Options


def make(options, seed, folder):
    """Writes the world to `folder`; see `_digits.make`."""
    _digits.make(options, seed, folder, same_start=False, split_task=True)
