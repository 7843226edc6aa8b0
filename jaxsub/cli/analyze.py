"""`jaxsub analyze`: spectra, nulls, held-out errors, lineages and one verdict a layer."""

import os
import sys

from jaxsub.pipelines import analyze

KEPT_IN = "--workdir"  # whose folder a stopped run goes on in


def config_class():
    """The program's Config."""
    return analyze.Config


def main(parsed):
    """Runs the analysis; the table goes to stdout, progress to stderr."""
    config = parsed.freeze()
    result = analyze.run(config, parsed.workdir, stream=sys.stderr)
    if result is None:  # of several processes, process 0 alone speaks
        return
    if config.dry_run:
        sys.stdout.write(result + "\n")
        return
    sys.stdout.write(result.table() + "\n")
    if not parsed.workdir:
        sys.stdout.write("nothing was saved; --workdir=FOLDER keeps the report and the statistics\n")
    else:
        sys.stdout.write(f"report: {os.path.join(parsed.workdir, 'report.html')}\n")
