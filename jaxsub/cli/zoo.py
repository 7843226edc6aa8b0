"""`jaxsub zoo`: makes a collection of small models of known truth."""

import sys

from jaxsub import errors
from jaxsub.pipelines import zoo


def config_class():
    """The program's Config."""
    return zoo.Config


def main(parsed):
    """Makes the collection and says where it lies."""
    config = parsed.freeze()
    if not parsed.workdir:
        raise errors.ConfigError("no workdir: give --workdir=FOLDER")
    sys.stdout.write(f"{zoo.run(config, parsed.workdir)}\n")
