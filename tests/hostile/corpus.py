"""The corpus of bad inputs for tests: its cases, and a folder in which it is unpacked."""

import functools
import json
import tarfile

from tests.conftest import shared_folder


def archive():
    """Path of the corpus, or None."""
    folder = shared_folder()
    path = folder / "tools" / "bad_inputs.tar.gz" if folder else None
    return path if path and path.exists() else None


@functools.cache
def cases(*scopes):
    """The manifest's cases of some scopes; none where there is no corpus."""
    if archive() is None:
        return []
    with tarfile.open(archive()) as tar:
        manifest = json.load(tar.extractfile("bad_inputs/manifest.json"))
    return [case for case in manifest["cases"] if case["scope"] in scopes]


def unpack(folder):
    """Unpacks it, pipes and links and all, and returns the folder that entries are relative to."""
    with tarfile.open(archive()) as tar:
        tar.extractall(folder, filter="fully_trusted")
    return folder / "bad_inputs"
