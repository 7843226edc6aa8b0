"""Runs one program as an absl app and maps what it raises to the exit codes of the README."""

import contextlib
import dataclasses
import functools
import importlib
import logging as stdlib_logging
import os
import platform
import select
import signal
import sys
import threading
import traceback
import zlib

from absl import app, flags as absl_flags, logging

from jaxsub import errors, launcher
from jaxsub.formats import _output

PATIENCE = 0.2  # seconds that a program may take to stop without a word


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the same clean-up runs."""


def program(name, argv):
    """Runs `jaxsub.cli.<name>` with its flags and exits."""
    keep_compiled_kernels()  # some programs import jax with their module
    module = importlib.import_module(f"jaxsub.cli.{name}")
    debug = "--debug" in argv

    def parse(arguments):
        from jaxsub.cli import flags

        if any(a in flags.HELP for a in arguments):
            sys.stdout.write(flags.help_text(name, module.config_class(), (module.__doc__ or "").partition("\n")[0]))
            sys.stdout.flush()
            sys.exit(0)
        absl_flags.FLAGS.mark_as_parsed()  # absl's own flags are not used; its app insists all the same
        return flags.Flags(name, module.config_class(), arguments)

    def main(parsed):
        logging.set_verbosity(logging.WARNING)  # jax reports every backend it does not find
        logging.get_absl_handler().setFormatter(stdlib_logging.Formatter("jaxsub: %(message)s"))
        if "num_processes" not in {f.name for f in dataclasses.fields(module.config_class())}:
            launcher.require_alone(f"jaxsub {name}")
        module.main(parsed)
        sys.stdout.flush()  # here, where a reader who has gone is met below; absl's app ends by SystemExit

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, functools.partial(_stop, f"jaxsub {name}: {{}}; {_again(module)}\n"))
    _listen(name)
    try:
        app.run(main, argv=argv, flags_parser=parse)
    except errors.JaxsubError as error:
        _fail(f"jaxsub {name}: {error}", error.exit_code, debug)
    except _Terminated:
        _fail(f"jaxsub {name}: terminated; {_again(module)}", 143, debug)
    except KeyboardInterrupt:
        _fail(f"jaxsub {name}: interrupted; {_again(module)}", 130, debug)
    except BrokenPipeError:
        # Whoever read the output has gone, as in `jaxsub inspect ... | head`: nothing to say, nobody to say it to.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        cause = _resource(error)
        if cause:
            _fail(f"jaxsub {name}: {cause}", errors.ResourceError.exit_code, debug)
        text = f"{type(error).__name__}: {errors.quote(error)} {_place(error)}"
        _fail(f"jaxsub {name}: this is a bug in jaxsub ({text}); report it with what --debug prints", 70, debug)


def _again(module):
    """What becomes of a program that was stopped; one that goes on names the flag of the folder that it does so in."""
    if hasattr(module, "KEPT_IN"):
        return f"with {module.KEPT_IN}, the same command goes on where it stopped"
    return "nothing of it is kept: the same command starts over"


def keep_compiled_kernels():
    """Lets a second start compile nothing: JAX's compilation cache in the user's cache folder, unless set otherwise.

    Must run before jax is imported. Compiled CPU code holds for one kind of CPU, so each kind has a folder of its own:
    home folders are shared between machines.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        with open("/proc/cpuinfo", "rb") as file:
            kind = next((line for line in file if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        kind = b""
    kind = f"{platform.machine()}-{zlib.crc32(kind):08x}"
    folder = os.path.join(root, "jaxsub", "kernels", kind)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return  # a read-only home: kernels are compiled again
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _stop(said, number, frame):
    # The second signal ends the process at once, even inside a device call.
    signal.signal(number, signal.SIG_DFL)
    is_term = number == signal.SIGTERM
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            # Modules take an exception while they are imported for a library that is missing, and go on without it.
            sys.stderr.write(said.format("terminated" if is_term else "interrupted"))
            sys.stderr.flush()
            os._exit(143 if is_term else 130)
        frame = frame.f_back
    raise _Terminated if is_term else KeyboardInterrupt


def _listen(name):
    """Hears signals in a thread of its own: the main one may sit in a device call, which cannot be interrupted.

    Says then what is waited for, and ends the process at the second signal.
    """
    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def listen():
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(heard, 1)[0]
        if not select.select([heard], [], [], PATIENCE)[0]:
            tracing = sys.modules.get("jaxsub.pipelines.tracing")
            where = errors.quote(tracing.last, 60) if tracing and tracing.last else "the current step"
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"jaxsub {name}: stopping after {where}; a second signal ends it at once\n")
                sys.stderr.flush()
        while number := os.read(heard, 1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):
                os._exit(128 + number)

    threading.Thread(target=listen, daemon=True, name="signals").start()


def _resource(error):
    """What ran out, or None if the error is of another kind."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:2000]:
        return "out of memory; bound it with --max_host_bytes or --max_device_bytes, or look at the plan with --dry_run"
    if isinstance(error, OSError) and error.errno in _output.DISK:
        return f"{errors.quote(error.filename or 'output')}: {error.strerror}; make room and run the same command again"
    return None


def _place(error):
    """'at file:line' of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def _fail(message, status, debug):
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    # Worker threads may sit in a device call that cannot be interrupted: leave without waiting for them.
    os._exit(status)
