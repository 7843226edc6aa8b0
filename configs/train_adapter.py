"""Can a new adapter be trained as a few cores in the joint subspace of others, and be used in PEFT?

    jaxsub train --config=configs/train_adapter.py --workdir=runs/adapter

The bundle: `jaxsub zoo --world=lora --workdir=runs`, `jaxsub fit --collection=runs/lora/models --rank=8
--workdir=runs/cores`. 25 s of processor time.
Expect .943 with 128 numbers, beside .952 (LoRA, 808), .964 (last layer, 650) and .794 (random subspace, 128).
"""

from jaxsub import config
from jaxsub.pipelines import train


def get_config(bundle="runs/cores/bundle", base="runs/lora/base.safetensors"):
    """Cores beside LoRA, the last layer and full training, on other names for the digits."""
    options = config.default(train.Config)
    options.bundle, options.base = bundle, base
    options.parametrisation = "core"
    options.task_options = ("variant=names", "draw=1000")
    options.tasks, options.seeds, options.steps = 3, 3, 300
    options.write_models = "runs/adapters"
    return options
