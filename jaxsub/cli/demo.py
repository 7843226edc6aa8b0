"""`jaxsub demo`: collections of known truth, trained and analysed."""

import sys

from jaxsub import errors
from jaxsub.pipelines import demo

KEPT_IN = "--workdir"  # whose folder a stopped run goes on in


def config_class():
    """The program's Config."""
    return demo.Config


def main(parsed):
    """Runs the demo; the table goes to stdout."""
    config = parsed.freeze()
    if not parsed.workdir:
        raise errors.ConfigError("no workdir: give --workdir=FOLDER")
    sys.stdout.write(demo.run(config, parsed.workdir, stream=sys.stderr) + "\n")
