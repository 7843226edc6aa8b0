"""Inner products of LoRA updates from factors stored in bfloat16; peers, and the model, make them float32."""

import dataclasses

from jaxsub.workloads import lora_gram

REFERENCE = lora_gram.REFERENCE


@dataclasses.dataclass(frozen=True)
class Options(lora_gram.Options):
    """Size of the collection, and the dtype that its factors are stored in."""

    stored: str = "bfloat16"


QUICK = Options(models=64, inputs=1024, outputs=1024)
problem, work, communication = lora_gram.problem, lora_gram.work, lora_gram.communication
ours, peers, error = lora_gram.ours, lora_gram.peers, lora_gram.error
