"""Rows are weights minus those of a base model (task vectors). Chosen by `--base`. LoRA products have no base."""

REFERENCE = "Ilharco et al. 2023, task vectors"
NEEDS_BASE = True


def groups(collection):
    """The dense layer groups; low-rank updates are differences already and stay as they are."""
    return collection.groups
