"""`jaxsub PROGRAM [flags]`: finds the program, imports only it, and turns errors into one message and an exit code."""

import os
import signal
import sys

PROGRAMS = {
    "demo": "trains collections of known truth, analyses them, prints the verdicts",
    "inspect": "what a collection holds, from headers alone",
    "analyze": "what a collection's weights share, layer by layer, and why: the report",
    "fit": "a subspace for every layer and its models as coefficients: a bundle",
    "update": "models added to a bundle, or removed from it",
    "project": "any models as coefficients of a bundle, what that loses, and their reconstructions",
    "train": "new tasks by coefficients of a bundle alone, beside random subspaces, LoRA and full training",
    "merge": "one model out of many, by the method of your choice, in their own format",
    "verify": "checks every byte of a bundle",
    "zoo": "makes a collection of small models of known truth",
    "bench": "throughput and accuracy of the kernels on this machine, beside their peers",
}


def entry(argv=None):
    """Console entry; returns through sys.exit with the status of the README."""
    argv = list(sys.argv if argv is None else argv)
    name = argv[1] if len(argv) > 1 else "--help"
    if name in ("--help", "-h", "help", "--helpfull", "--helpshort"):
        sys.stdout.write(_overview())
        sys.exit(0)
    if name == "--version":
        from jaxsub import __version__

        sys.stdout.write(__version__ + "\n")
        sys.exit(0)
    if name not in PROGRAMS:
        from jaxsub import errors

        sys.stderr.write(
            f"jaxsub: no program {errors.quote(name)!r}{errors.nearest(name, PROGRAMS)}; see jaxsub --help\n"
        )
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the program's own handlers are there
        signal.signal(number, _too_early)
    from jaxsub.cli import _run

    _run.program(name, argv[1:])


def _too_early(number, _):
    sys.stderr.write("jaxsub: stopped before it began\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _overview():
    rows = "\n".join(f"  {name:9} {text}" for name, text in PROGRAMS.items())
    return (
        "jaxsub PROGRAM [flags]\n\nWhat do the weights of many models of one architecture share, and is it more than "
        f"chance or descent?\n\n{rows}\n\njaxsub PROGRAM --help lists a program's flags.\n"
    )
