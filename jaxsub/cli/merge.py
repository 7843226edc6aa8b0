"""`jaxsub merge`: one model out of many, in their own format."""

import os
import sys

from jaxsub import errors
from jaxsub.pipelines import aside, merge, merge_words

KEPT_IN = "--out"  # whose folder a stopped run goes on in


def config_class():
    """The program's Config."""
    return merge.Config


def main(parsed):
    """What was merged goes to stdout, progress to stderr."""
    config = parsed.freeze()
    if config.bench:
        _bench(config, parsed.workdir)
        return
    found = merge.run(config, parsed.workdir, stream=sys.stderr)
    if config.dry_run:
        sys.stdout.write(found["text"] + "\n")
        return
    sys.stdout.write(aside.listed(found["quarantined"]) + merge_words.table(found) + "\n")
    sys.stdout.write(f"merged model: {errors.quote(config.out or os.path.join(parsed.workdir, 'merged'), 400)}\n")


def _bench(config, workdir):
    from jaxsub.pipelines import merge_bench, merge_bench_table

    found = merge_bench.run(config, workdir, stream=sys.stderr)
    sys.stdout.write(merge_bench_table.table(found) + "\n")
