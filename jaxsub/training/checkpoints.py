"""States of a training on disk, by orbax: whole or not there, the last two kept.

folder/00000400   the State after 400 steps, its leaves numbered
"""

import os
import re
import shutil

import jax
import numpy as np

from jaxsub import errors
from jaxsub.formats import _files

KEPT = 2
_STEP = re.compile(r"[0-9]{8,}")


def save(folder, state):
    """Writes a State; older ones than the last two are removed.

    Raises:
        ResourceError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    leaves = {f"{n:05d}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(jax.device_get(state)))}
    path = os.path.join(os.path.abspath(folder), f"{int(state.step):08d}")
    _files.make_folder(folder)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, leaves, force=True)
    except OSError as error:
        raise errors.ResourceError(f"{errors.quote(path)}: cannot be written: {error.strerror or error}") from error
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(os.path.join(folder, old), ignore_errors=True)


def restore(folder, like):
    """The last State in a folder, with the structure of `like`; None if there is none.

    Raises:
        WorkdirError: what is there is no State of this training.
    """
    if os.path.isdir(folder):
        for name in os.listdir(folder):  # what a killed run left half-written
            if not _STEP.fullmatch(name):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    steps = _steps(folder)
    if not steps:
        return None
    import orbax.checkpoint as ocp

    leaves, structure = jax.tree.flatten(like)
    wanted = {f"{n:05d}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in enumerate(leaves)}
    path = os.path.join(os.path.abspath(folder), steps[-1])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            known = checkpointer.metadata(path).item_metadata.tree  # orbax itself cuts and fills other shapes
            shapes = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in known.items()}
            if shapes != {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}:
                raise ValueError("other arrays")
            found = checkpointer.restore(path, wanted)
    except Exception as error:  # orbax and tensorstore raise what they like
        raise errors.WorkdirError(
            f"{errors.quote(path)}: no checkpoint of this training ({type(error).__name__}); remove it, or --restart"
        ) from error
    return jax.tree.unflatten(structure, [found[name] for name in sorted(wanted)])


def _steps(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if _STEP.fullmatch(name)), key=int)
