"""`jaxsub update`: models added to a bundle, or removed from it; a new bundle, the old one stays as it is."""

import os
import sys

from jaxsub import errors
from jaxsub.pipelines import aside, update


def config_class():
    """The program's Config."""
    return update.Config


def main(parsed):
    """Writes WORKDIR/bundle; what was done to each layer goes to stdout, progress to stderr."""
    config = parsed.freeze()
    if not parsed.workdir:
        raise errors.ConfigError("no place for the bundle: give --workdir=FOLDER")
    path = os.path.join(parsed.workdir, "bundle")
    result = update.run(config, path, stream=sys.stderr)
    sys.stdout.write(aside.listed(result.provenance["updates"][-1]["quarantined"]))
    sys.stdout.write(update.table(result) + f"\nbundle: {path}\n")
