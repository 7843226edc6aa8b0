"""Model files: from paths to `descriptors.Model`, headers first, and from tensors to arrays. No jax.

A reader is a module of this folder with `claims(path)` and `open(path, *, root, allow_roots)`; the file name is
its registration. A path has one reader, chosen by layout and ending; a file it refuses is not tried by another.
LoRA files end as raw safetensors do: their readers claim no path, `safetensors` hands over to their `assemble`.
A reader that can also write its models again has `ENDING` and `rewrite(model, path, layers)`.
"""

import functools
import os

from jaxsub import errors, plugins
from jaxsub.formats import _files, _hints, _model, _sniff

EXTENSIONS = frozenset(_sniff.EXTENSIONS)
SHARED_BASIS = _sniff.SHARED_BASIS  # a file that several models stand on, and no model


def open_model(path, *, root=None, allow_roots=()):
    """The Model at a path: one file, or one folder.

    Args:
        path: file or folder.
        root: the collection's folder; links may lead anywhere inside it. Default: the model's own folder.
        allow_roots: more folders that links may lead into.

    Raises:
        InputError: nothing there, unknown, damaged, hostile, or of a kind that is not supported.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        root = path if root is None else root
        path = _sniff.only_file(path) or path
    for reader in _readers():
        if reader.claims(path):
            return reader.open(path, root=root, allow_roots=allow_roots)
    raise _unknown(path, root, allow_roots)


@functools.cache
def _readers():
    """The plug-ins, looked up once: a collection opens thousands of files."""
    return [plugins.load("formats", name) for name in plugins.available("formats")]


def _unknown(path, root, allow_roots):
    known = ", ".join(sorted(EXTENSIONS))
    if os.path.isdir(path):
        return errors.InputError(path, "holds no model", hint="give a folder with weights", rule="H12")
    file = _files.identify(path, root=root, allow_roots=allow_roots)  # missing, a pipe, ...: says so itself
    seems = _hints.explain(_files.head(file), file.size)
    return errors.InputError(path, "is no model file that is known", hint=seems or f"known endings: {known}", rule="H8")


def is_model(path):
    """Whether a path is one model: a file with a known ending, or a folder laid out as one model.

    A folder that merely holds weight files is a collection, not a model, unless their names say otherwise.
    """
    if not os.path.isdir(path):
        return _sniff.extension(path) in EXTENSIONS and not os.path.basename(os.fspath(path)).startswith(".")
    stems = [os.path.join(path, stem) for stem in _sniff.WEIGHT_FILES]
    layouts = [
        stem + end for stem in stems for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    ]
    layouts += [os.path.join(path, name) for name in ("adapter_config.json", _sniff.LOADINGS, *_sniff.ADAPTER_FILES)]
    return any(os.path.lexists(name) for name in layouts) or _sniff.is_orbax(path)


def read(model, tensor):
    """One whole tensor in its storage dtype, row-major.

    Args:
        model: the Model that `tensor` came from.
        tensor: a Tensor, plain or a LoRA factor.

    Raises:
        InputChangedError: the file is not the one whose header was read.
    """
    return _model.read(tensor, model.load)


def blocks(model, tensor):
    """Flat arrays of about a megabyte that together are `read(model, tensor)`; what has no extent comes in one."""
    return _model.blocks(tensor, model.load)


def read_into(extent, byte_start, view, past_cache=False):
    """Fills a writable buffer from `byte_start` bytes into an Extent; see `_files.read_into`."""
    _files.read_into(extent, byte_start, view, past_cache)


def ending(model):
    """What a rewritten model's path ends with, such as ".safetensors"; nothing for a folder.

    Raises:
        ConfigError: models of this format cannot be written yet.
    """
    return _writer(model).ENDING


def rewrite(model, path, layers):
    """Writes a model again with other values in some layers: same format, names, dtypes; all else to the bit.

    Args:
        model: descriptors.Model, of a format that `ending` knows.
        path: file or folder, made here.
        layers: layer -> array of the weight's shape; for low-rank updates (a (k, i), b (o, k)), Delta-W = b @ a in the
            orientation of `LoraPair.shape`, written with a scale of 1, or (a, b, scale), Delta-W = scale * b @ a,
            written as they are.

    Raises:
        InputError: values that the stored dtype cannot hold.
        InputChangedError: the original is not as it was.
    """
    _writer(model).rewrite(model, path, layers)


def frames(model, folder):
    """A model's files in a folder, to be filled tensor by tensor; None where its format is written whole (`rewrite`).

    Args:
        model: descriptors.Model.
        folder: exists and becomes the model's folder; files that a run before this has begun there are gone on with.

    Returns:
        `_frame.Frames`: `write`, `copy`, `finish`; names are those of the stored tensors.

    Raises:
        InputError: dtypes that safetensors files do not have.
        ResourceError: no room for all of it.
    """
    module = plugins.load("formats", model.format)
    return module.frames(model, folder) if hasattr(module, "frames") else None


def _writer(model):
    module = plugins.load("formats", model.format)
    if not hasattr(module, "rewrite"):
        known = [n for n in plugins.available("formats") if hasattr(plugins.load("formats", n), "rewrite")]
        raise errors.ConfigError(
            f"{errors.quote(model.path)}: models of format {model.format} cannot be written yet; these can: "
            + ", ".join(known)
        )
    return module
