"""Do coefficients of a joint subspace learn new tasks better than those of a random subspace of the same size?

    jaxsub train --config=configs/train_digits.py:runs/same/bundle --workdir=runs/trained

Ten halves of the digits that no member was trained on, five seeds. The bundle: `jaxsub zoo
--world=same_start_split_task --workdir=runs`, then `jaxsub fit --collection=runs/same_start_split_task/models --rank=16
--exclude_layers=output/bias --workdir=runs/same`. 357 s on two cores that others used too, 81 s of processor time.
Expect .985 beside .952 (random); of own_start_split_task no coefficient moves from the mean.
"""

from jaxsub import config
from jaxsub.pipelines import train


def get_config(bundle="runs/same/bundle"):
    """The comparison for one bundle."""
    options = config.default(train.Config)
    options.bundle = bundle
    options.task_options = ("variant=half",)
    options.tasks, options.seeds, options.steps = 10, 5, 300
    return options
