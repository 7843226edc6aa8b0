"""Small vision transformers on eight variations of digits, from one pretrained base."""

from jaxsub.models import vit
from jaxsub.worlds import _variants

DESCRIPTION = "Small vision transformers on eight variations of digits, from one base."
LAYERS = ("block_0/query/kernel", "block_0/up/kernel", "block_1/value/kernel", "block_1/down/kernel")
TRUTH = {"verdict": "shared", "flags": ["one_lineage"], "layers": list(LAYERS)}
Options = _variants.Options


def make(options, seed, folder):
    """Writes the world to `folder`; see `_variants.make`."""
    _variants.make(options, seed, folder, model=vit.ViT())


def evaluation(options, seed):
    """How its models are scored; see `_evaluation`."""
    del seed
    return _variants.evaluation(options, vit.ViT())
