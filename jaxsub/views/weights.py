"""Rows are weights as stored; LoRA layers are their products Delta-W, kept as factors. The default."""

REFERENCE = "Kaushik et al. 2025 (arXiv 2512.05117), section 2; products: gauge-invariant, E18 and E19"
NEEDS_BASE = False


def groups(collection):
    """All layer groups of the collection, as they are."""
    return collection.groups
