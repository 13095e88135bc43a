#!/bin/bash
# One host: docs/launch/torchrun.sh run.yaml
# Two hosts: HOSTS=2 FIRST=name-of-one-of-them docs/launch/torchrun.sh run.yaml, on both.
# A process that is lost is started again with all others, up to three times, and the run continues from its newest
# checkpoint.
set -eu
run_file=$1
hosts=${HOSTS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of each process where it computes on the CPU
if [ "$hosts" = 1 ]; then
  exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts 3 \
    -m tunesmith train "$run_file" --train.resume true
fi
exec torchrun --nnodes "$hosts" --nproc-per-node "${PROCESSES:-auto}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$FIRST:${PORT:-29400}" --rdzv-id "${ID:-tunesmith}" \
  -m tunesmith train "$run_file" --train.resume true
