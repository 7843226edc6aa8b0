"""Which reader a path is for. A known ending decides alone, so that no file is ever tried by two parsers."""

import os

from jaxsub import errors
from jaxsub.formats import _files

EXTENSIONS = {
    ".safetensors": "safetensors",
    ".pt": "torch_zip", ".pth": "torch_zip", ".bin": "torch_zip", ".ckpt": "torch_zip",
    ".npz": "npz", ".npy": "npz",
    ".h5": "keras", ".hdf5": "keras", ".keras": "keras",
    ".msgpack": "flax_msgpack",
}  # fmt: skip
WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")
SIDECARS = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state.pth"}
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax is writing
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LOADINGS, SHARED_BASIS = "loadings.safetensors", "shared_components.safetensors"  # of lorashare


def only_file(path):
    """The one weight file of a folder whose names follow no layout, or None."""
    if is_orbax(path):
        return None
    names = set(_files.list_folder(path))
    stems = [stem + end for stem in WEIGHT_FILES for end in (".safetensors", ".bin")]
    if names & {"adapter_config.json", LOADINGS, *ADAPTER_FILES, *stems, *(stem + ".index.json" for stem in stems)}:
        return None
    found = [name for name in names - SIDECARS if extension(name) in EXTENSIONS]
    return os.path.join(path, found[0]) if len(found) == 1 else None


def extension(path):
    """The ending of a path in lower case, with its dot."""
    return os.path.splitext(os.fspath(path))[1].lower()


def kind(path):
    """Name of the reader for a path, or None: folders by the names in them, files by ending, then by content."""
    if os.path.isdir(path):
        return _folder_kind(path)
    return EXTENSIONS.get(extension(path)) or _content_kind(path)


def is_orbax(path):
    """Whether a folder is laid out as an orbax checkpoint, or as the beginning of one."""
    names = ("_METADATA", "manifest.ocdbt")
    return UNFINISHED in os.path.basename(path) or any(os.path.lexists(os.path.join(path, name)) for name in names)


def _folder_kind(path):
    if is_orbax(path):
        return "orbax"
    adapter = ("adapter_config.json", *ADAPTER_FILES)
    if any(os.path.lexists(os.path.join(path, name)) for name in adapter):
        return "peft"
    return "lorashare" if os.path.lexists(os.path.join(path, LOADINGS)) else "huggingface"


def _content_kind(path):
    """For endings that say nothing; a link with such an ending is not looked into."""
    if os.path.islink(path):
        return None
    try:
        file = _files.identify(path)
        head = _files.head(file, 16)
    except errors.InputError:
        return None
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if head.startswith(b"\x93NUMPY"):
        return "npz"
    length = int.from_bytes(head[:8], "little")
    return "safetensors" if 0 < length <= file.size - 8 and head[8:9] == b"{" else None
