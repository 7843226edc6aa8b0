"""What lies in folders that programs wrote."""

import os


def contents(folder):
    """Relative path -> bytes of every file below a folder."""
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found
