"""`jaxsub train`: new tasks by coefficients of a bundle's subspaces alone, beside baselines."""

import sys

from jaxsub.pipelines import train

KEPT_IN = "--workdir"  # whose folder a stopped run goes on in


def config_class():
    """The program's Config."""
    return train.Config


def main(parsed):
    """The table goes to stdout, progress to stderr, record, metrics and checkpoints to the workdir if there is one."""
    from jaxsub.pipelines import train_table

    config = parsed.freeze()
    found = train.run(config, parsed.workdir, stream=sys.stderr)
    sys.stdout.write((train_table.planned(found) if config.dry_run else train_table.table(found)) + "\n")
    if config.write_models and not config.dry_run:
        sys.stdout.write(f"models: {config.write_models}\n")
