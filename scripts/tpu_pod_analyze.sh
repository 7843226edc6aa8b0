#!/bin/bash
# One analysis on all hosts of a TPU pod slice: scripts/tpu_pod_analyze.sh TPU_NAME ZONE COLLECTION WORKDIR
# The collection and the workdir must be mounted at the same place on every host (gcsfuse, Filestore, a shared disk).
# JAX finds the hosts by the TPU's metadata.
set -euo pipefail
run=$(printf '%q ' jaxsub analyze --collection="$3" --workdir="$4" "${@:5}")
gcloud compute tpus tpu-vm ssh "$1" --zone="$2" --worker=all \
    --command="pip install --quiet 'jax[tpu]' jaxsub && $run"
