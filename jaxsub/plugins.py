"""Plug-ins are modules: the file name is the registration. Looks them up by package and name."""

import importlib
import pkgutil

from jaxsub import errors


def available(package):
    """Sorted names of the plug-ins of `jaxsub.<package>`; modules that start with '_' are not plug-ins."""
    folder = importlib.import_module(f"jaxsub.{package}")
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def load(package, name):
    """The module `jaxsub.<package>.<name>`; "row-pca" and "row_pca" are one name.

    Raises:
        ConfigError: if there is no such plug-in; names the nearest one.
    """
    names, name = available(package), name.replace("-", "_")
    if name not in names:
        raise errors.ConfigError(
            f"no {package} called {name!r}{errors.nearest(name, names)} (there are: {', '.join(names)})"
        )
    return importlib.import_module(f"jaxsub.{package}.{name}")
