#!/bin/bash
#SBATCH --job-name=fleet-october
#SBATCH --array=1-16
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --requeue
# Slurm says which of the 16 tasks this is. The store may be a folder that all nodes mount.
set -euo pipefail
export CACHEBUILDER_CACHE_DIR=${SLURM_TMPDIR:-/tmp}/cachebuilder-$USER
cachebuilder fleet build "${FLEET:-fleet.yaml}" --shard auto
