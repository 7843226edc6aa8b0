"""`jaxsub project`: any models as coefficients of a bundle, what that loses, and models as files again."""

import sys

from jaxsub.pipelines import aside, project


def config_class():
    """The program's Config."""
    return project.Config


def main(parsed):
    """The errors go to stdout, progress to stderr, coefficients and figures to the workdir if there is one."""
    config = parsed.freeze()
    found = project.run(config, parsed.workdir, stream=sys.stderr)
    sys.stdout.write(aside.listed(found["quarantined"]))
    if not config.members:
        sys.stdout.write(project.table(found) + "\n")
    sys.stdout.write(project.written(found))
    if config.write_models:
        sys.stdout.write(f"reconstructions: {config.write_models}\n")
    if not parsed.workdir and not config.members:
        sys.stdout.write("coefficients were not saved; --workdir=FOLDER keeps them\n")
