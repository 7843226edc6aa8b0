"""`jaxsub bench`: throughput and accuracy of the kernels, beside the peers that are installed."""

import sys

from jaxsub.pipelines import bench


def config_class():
    """The program's Config."""
    return bench.Config


def main(parsed):
    """The table goes to stdout, progress to stderr, bench.json to the workdir."""
    record = bench.run(parsed.freeze(), parsed.workdir, progress=lambda line: sys.stderr.write(line + "\n"))
    sys.stdout.write(bench.table(record) + "\n")
