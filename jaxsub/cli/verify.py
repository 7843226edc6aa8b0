"""`jaxsub verify`: checks every byte of a bundle or a workdir against what was written."""

import sys

from jaxsub.pipelines import verify


def config_class():
    """The program's Config."""
    return verify.Config


def main(parsed):
    """One line a damaged file on stdout; damage is exit status 4."""
    verify.run(parsed.freeze(), parsed.workdir, write=sys.stdout.write)
