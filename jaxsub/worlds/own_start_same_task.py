"""Networks on digits, own starts, all on the ten classes."""

from jaxsub.worlds import _digits

DESCRIPTION = "Networks on digits, own starts, all on the ten classes."
TRUTH = {"verdict": "chance", "flags": [], "layers": list(_digits.KERNELS)}
Options = _digits.Options


def make(options, seed, folder):
    """Writes the world to `folder`; see `_digits.make`."""
    _digits.make(options, seed, folder, same_start=False, split_task=False)
