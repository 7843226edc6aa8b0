"""What a user names as `module:name`: a function, a model or a task of their own. Only that module is run."""

import contextlib
import hashlib
import importlib
import inspect
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
    """SHA-256 of the files that `module:name` is named in and defined in; what these import is not looked at.

    Files in archives too. "" where there are none, or they are gone since they were imported.

    Raises:
        ConfigError: as `load`.
    """
    found = load(option, spec)
    modules = dict.fromkeys((sys.modules[spec.partition(":")[0]], inspect.getmodule(found)))
    texts = [_content(module) for module in modules]
    return hashlib.sha256(b"\0".join(texts)).hexdigest() if any(texts) else ""


def _content(module):
    try:
        return module.__loader__.get_data(module.__file__)
    except (AttributeError, TypeError, OSError):
        return b""
