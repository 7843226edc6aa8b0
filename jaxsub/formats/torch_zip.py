"""Torch files (.pt, .pth, .bin, .ckpt) as one model each. No torch, no pickle module; see `_torch`."""

from jaxsub.formats import _model, _sniff, _torch


def claims(path):
    """Whether `path` is a torch file by its ending."""
    return _sniff.kind(path) == "torch_zip"


def open(path, *, root=None, allow_roots=()):
    """The Model in one torch zip file; state dicts nested in others keep their path as a prefix ('model.fc.weight').

    Raises:
        InputError: see `_torch.content`.
    """
    return _model.from_content(path, "torch_zip", _torch.content(path, root=root, allow_roots=allow_roots))
