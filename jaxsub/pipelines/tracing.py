"""A trace of a run for the viewers of jax.profiler (xprof, Perfetto): what devices and threads did, and when."""

import contextlib
import os

from jaxsub import errors

FOLDER = "profile"


@contextlib.contextmanager
def traced(folder):
    """Writes a trace of the block to `folder`; does nothing where it is None.

    Below `folder` lie plugins/profile/<time>/*.xplane.pb, for xprof, and perfetto_trace.json.gz, for ui.perfetto.dev.
    """
    if folder is None:
        yield
        return
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python would hide the rest, and slow it
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield


def folder_of(config, workdir):
    """Where the trace of a run goes: None unless `config.profile`.

    Raises:
        ConfigError: there is no workdir.
    """
    if not config.profile:
        return None
    if workdir is None:
        raise errors.ConfigError("profile: no place for the trace: give --workdir=FOLDER")
    return os.path.join(workdir, FOLDER)


last = ""  # the stage that was begun last; a program that is asked to stop says what it waits for


def stage(name):
    """Context that bears a name in the trace, such as a layer's; next to free where there is none."""
    import jax

    global last
    last = name
    return jax.profiler.TraceAnnotation(name.encode("utf-8", "backslashreplace").decode())
