"""`jaxsub inspect`: what a collection holds, from headers alone."""

import sys

from jaxsub.pipelines import inspect


def config_class():
    """The program's Config."""
    return inspect.Config


def main(parsed):
    """Writes the page to stdout, and inspect.json to the workdir if there is one."""
    inspect.run(parsed.freeze(), parsed.workdir, write=sys.stdout.write)
