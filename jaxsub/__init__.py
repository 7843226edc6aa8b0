"""jaxsub: what do the weights of a collection of trained models share, and is it more than chance or descent?

report = jaxsub.analyze(jaxsub.open_collection("runs/zoo"))
print(report.table())
"""

__version__ = "0.1.0"

__all__ = ["__version__", "analyze", "fit", "load", "open_collection"]


def open_collection(paths, **options):
    """A collection of models, from headers only; see `jaxsub.collection.open_collection`.

    Args:
        paths: a folder, a glob, a text file of paths, or a list of them.
        **options: layers, exclude_layers, match, allow_roots, max_quarantined, strict; smallest=1 where a single
            model will do, to be projected.

    Returns:
        Collection.

    Raises:
        InputError: fewer than three models can be read, or too many had to be set aside.
    """
    import inspect

    from jaxsub import collection, errors

    known = [n for n in inspect.signature(collection.open_collection).parameters if n != "paths"]
    for name in options:
        if name not in known:
            raise errors.ConfigError(f"no option {name!r}{errors.nearest(name, known)}")
    return collection.open_collection(paths, **options)


def analyze(models, workdir=None, **options):
    """Spectra, nulls, held-out errors, lineages and one verdict a layer.

    Args:
        models: a Collection, or what `open_collection` takes.
        workdir: folder for the statistics and the report; None keeps everything in memory.
        **options: fields of `jaxsub.pipelines.analyze.Config`.

    Returns:
        Report, as report.json; `.table()` is text, `.save(folder)` writes it.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError.
    """
    from jaxsub import config
    from jaxsub.pipelines import analyze as pipeline

    if _is_open(models):
        return pipeline.analyze(models, config.freeze(pipeline.Config, options), workdir)
    return pipeline.run(config.freeze(pipeline.Config, {"collection": _paths(models), **options}), workdir)


def fit(models, path=None, **options):
    """A subspace for every layer, and the models as coefficients.

    Args:
        models: a Collection, or what `open_collection` takes.
        path: new folder for the bundle; None keeps it in memory.
        **options: fields of `jaxsub.pipelines.fit.Config`: rank, energy, decomposition, layers, ...

    Returns:
        Bundle, with `project`, `reconstruct`, `coefficients`, `accounting`, `save`.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError.
    """
    from jaxsub import config
    from jaxsub.pipelines import fit as pipeline

    if _is_open(models):
        return pipeline.fit(models, config.freeze(pipeline.Config, options), path)
    return pipeline.run(config.freeze(pipeline.Config, {"collection": _paths(models), **options}), path)


def load(path):
    """The Bundle in a folder that `fit` or `Bundle.save` wrote.

    Raises:
        InputError: no bundle, or a damaged one.
    """
    from jaxsub.bundle import files

    return files.load(path)


def _is_open(models):
    return not isinstance(models, (str, bytes)) and hasattr(models, "groups")


def _paths(models):
    return (models,) if isinstance(models, str) else tuple(str(m) for m in models)
