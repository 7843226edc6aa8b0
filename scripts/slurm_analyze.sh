#!/bin/bash
# One analysis on several nodes of a Slurm cluster: sbatch scripts/slurm_analyze.sh COLLECTION WORKDIR
# A fit is started the same way: `jaxsub fit` in place of `jaxsub analyze`, with --rank or --energy.
# Both must lie on a file system that all nodes see. JAX finds the nodes by Slurm's own variables.
#SBATCH --job-name=jaxsub
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=8
#SBATCH --cpus-per-task=32
#SBATCH --time=02:00:00
# Resume by submitting again: layers that are done are not read again.
srun --kill-on-bad-exit=1 jaxsub analyze --collection="$1" --workdir="$2" "${@:3}"
