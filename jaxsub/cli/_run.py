"""Runs one program as an absl app and maps what it raises to the exit codes of the README."""

import contextlib
import importlib
import os
import signal
import sys
import traceback

from absl import app, flags as absl_flags, logging

from jaxsub import errors


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that the same clean-up runs."""


def program(name, argv):
    """Runs `jaxsub.cli.<name>` with its flags and exits."""
    module = importlib.import_module(f"jaxsub.cli.{name}")
    debug = "--debug" in argv

    def parse(arguments):
        from jaxsub.cli import flags

        wants_help = [a for a in arguments if a in ("--help", "-h", "--helpfull", "--helpshort")]
        parsed = flags.Flags(name, module.config_class(), [a for a in arguments if a not in wants_help])
        if wants_help:
            sys.stdout.write(parsed.help())
            sys.exit(0)
        absl_flags.FLAGS.mark_as_parsed()  # absl's own flags are not used; its app insists all the same
        return parsed

    def main(parsed):
        logging.set_verbosity(logging.WARNING)  # jax reports every backend it does not find
        module.main(parsed)

    signal.signal(signal.SIGTERM, _terminate)
    try:
        app.run(main, argv=argv, flags_parser=parse)
    except errors.JaxsubError as error:
        _fail(f"jaxsub {name}: {error}", error.exit_code, debug)
    except _Terminated:
        _fail(f"jaxsub {name}: terminated; the same command goes on where it stopped", 143, debug)
    except KeyboardInterrupt:
        _fail(f"jaxsub {name}: interrupted; the same command goes on where it stopped", 130, debug)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _fail(f"jaxsub {name}: out of memory; bound it with --config.max_host_bytes", 6, debug)
    except Exception as error:
        text = f"{type(error).__name__}: {errors.quote(error)}"
        _fail(f"jaxsub {name}: this is a bug in jaxsub ({text}); run with --debug and report what it prints", 70, debug)


def _terminate(*_):
    raise _Terminated


def _fail(message, status, debug):
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    # Worker threads may sit in a device call that cannot be interrupted: leave without waiting for them.
    os._exit(status)
