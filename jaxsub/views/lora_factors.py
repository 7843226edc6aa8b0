"""Rows are the stored LoRA factors A and B, each a dense layer of its own, as the paper stacks them.

Not gauge-invariant: B R and R^-1 A are the same update with other factors, and one common draw for A makes the
stacked A look shared. For comparison with published numbers; `weights` looks at the product.
"""

import dataclasses

from jaxsub import errors

REFERENCE = "Kaushik et al. 2025 (arXiv 2512.05117), appendix B.5 as described by its reviewers; EigenLoRAx"
NEEDS_BASE = False


def groups(collection):
    """Dense groups, and for every LoRA group one group of A and one of B for each rank, of any number of models."""
    if all(g.parametrisation != "lora" for g in collection.groups):
        raise errors.ConfigError("view=lora_factors: the collection holds no LoRA layers")
    found = []
    for group in collection.groups:
        if group.parametrisation != "lora":
            found.append(group)
            continue
        for side in ("a", "b"):
            tensors = [getattr(e, side) for e in group.entries]
            shapes = {t.shape for t in tensors}
            for shape in sorted(shapes):
                at = [i for i, t in enumerate(tensors) if t.shape == shape]
                found.append(
                    dataclasses.replace(
                        group,
                        name=f"{group.name}.lora_{side.upper()}",
                        shape=shape,
                        parametrisation="dense",
                        members=tuple(group.members[i] for i in at),
                        entries=tuple(tensors[i] for i in at),
                    )
                )
    return tuple(found)
