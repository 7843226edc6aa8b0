"""What a user names as `module:name`: a function, a model or a task of their own. Only that module is run."""

import contextlib
import hashlib
import importlib
import os
import sys

from jaxsub import errors


def load(option, spec):
    """What `module:name` names, looked for in the current folder first.

    Raises:
        ConfigError: no such name, or a module that cannot be imported.
    """
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise errors.ConfigError(
            f"{option}={errors.quote(spec)}: give module:function, such as --{option}=evaluate:{option}"
        )
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the user's own code: anything may come
        raise errors.ConfigError(
            f"{option}={spec}: {module} cannot be imported from {errors.quote(folder)} or the path: "
            f"{type(error).__name__}: {errors.quote(error)}"
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    if found is None:
        raise errors.ConfigError(f"{option}={spec}: {module} has nothing called {name}")
    return found


def digest(option, spec):
    """SHA-256 of the file that `module:name` is in, an archive's part too; what that file imports is not looked at.

    "" where there is no file, or where it is gone since it was imported.

    Raises:
        ConfigError: as `load`.
    """
    load(option, spec)
    module = sys.modules[spec.partition(":")[0]]
    path, loader = getattr(module, "__file__", None), getattr(module, "__loader__", None)
    if path is None:
        return ""
    try:
        if hasattr(loader, "get_data"):
            return hashlib.sha256(loader.get_data(path)).hexdigest()
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""
