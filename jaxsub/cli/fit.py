"""`jaxsub fit`: a subspace for every layer of a collection, and its models as coefficients, in one folder."""

import os
import sys

from jaxsub import errors
from jaxsub.pipelines import aside, fit


def config_class():
    """The program's Config."""
    return fit.Config


def main(parsed):
    """Fits and writes WORKDIR/bundle; the table goes to stdout, progress to stderr."""
    config = parsed.freeze()
    if config.dry_run:
        sys.stdout.write(fit.run(config) + "\n")
        return
    if not parsed.workdir:
        raise errors.ConfigError("no place for the bundle: give --workdir=FOLDER")
    result = fit.run(config, workdir=parsed.workdir, stream=sys.stderr)
    sys.stdout.write(aside.listed(result.provenance["quarantined"]))
    sys.stdout.write(fit.table(result) + f"\nbundle: {os.path.join(parsed.workdir, 'bundle')}\n")
