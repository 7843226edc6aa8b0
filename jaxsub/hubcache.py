"""Models by name in the local cache of Hugging Face downloads. Never fetches anything.

<cache>/models--org--name/refs/<revision>         text: a commit
<cache>/models--org--name/snapshots/<commit>/     the model, as links into blobs/
"""

import os
import re

MAIN = "main"  # the revision when none is given
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def folder():
    """The cache: HF_HUB_CACHE, HF_HOME/hub, or huggingface/hub in the user's cache folder."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return _expanded(given)
    home = os.environ.get("HF_HOME")
    if home:
        return os.path.join(_expanded(home), "hub")
    return os.path.join(_expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "huggingface", "hub")


def _expanded(path):
    return os.path.expandvars(os.path.expanduser(path))


def is_name(text):
    """Whether a text is org/name or org/name@revision as the hub allows them, and no path that climbs."""
    match = _NAME.fullmatch(text)
    return bool(match) and not any(bad in text for bad in ("..", "--")) and len(text) <= 256


def locate(text):
    """(folder of the model's files or None, paths that were looked for) of a name."""
    org, name, revision = _NAME.fullmatch(text).groups()
    entry = os.path.join(folder(), f"models--{org}--{name}")
    looked = [entry]
    commit = revision = revision or MAIN
    if os.path.isdir(entry) and not _COMMIT.fullmatch(revision):
        looked.append(os.path.join(entry, "refs", *revision.split("/")))
        commit = _read_commit(looked[-1])
    if os.path.isdir(entry) and commit:
        looked.append(os.path.join(entry, "snapshots", commit))
        if os.path.isdir(looked[-1]):
            return looked[-1], looked
    return None, looked


def _read_commit(path):
    """The commit in a file of refs/, or None."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="ascii", errors="replace") as file:
        text = file.read(64).strip()
    return text if _COMMIT.fullmatch(text) else None
