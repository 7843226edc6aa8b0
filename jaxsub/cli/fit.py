"""`jaxsub fit`: a subspace for every layer of a collection, and its models as coefficients, in one folder."""

import os
import sys

from jaxsub import errors
from jaxsub.pipelines import aside, fit

KEPT_IN = "--workdir"  # whose folder a stopped run goes on in


def config_class():
    """The program's Config."""
    return fit.Config


def main(parsed):
    """Fits and writes WORKDIR/bundle; the table goes to stdout, progress to stderr."""
    config = parsed.freeze()
    if not (parsed.workdir or config.dry_run):
        raise errors.ConfigError("no place for the bundle: give --workdir=FOLDER")
    result = fit.run(config, workdir=parsed.workdir, stream=sys.stderr)
    if result is None:  # of several processes, process 0 alone speaks
        return
    if config.dry_run:
        sys.stdout.write(result + "\n")
        return
    sys.stdout.write(aside.listed(result.provenance["quarantined"]))
    sys.stdout.write(fit.table(result) + f"\nbundle: {os.path.join(parsed.workdir, 'bundle')}\n")
