#!/usr/bin/env bash
# Starts an example with torchrun, on all GPUs of one node, or of several:
#
#   examples/launch/torchrun.sh examples/trainer_gpt2.py
#   NODES=2 HEAD=node-0 examples/launch/torchrun.sh examples/trainer_gpt2.py   # on every node, at about the same time
#
# NODES  number of nodes (1 if not given)
# HEAD   name or address of one of the nodes, which the others can reach
# GPUS   ranks on each node (all GPUs if not given; cores where there are none)
# PORT   a free port there (29500 if not given)
set -euo pipefail

NODES="${NODES:-1}"
if [ "$NODES" = 1 ]; then HEAD="${HEAD:-localhost}"; fi
: "${HEAD:?set HEAD to the name of one of the nodes}"

exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-auto}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-mics}" "$@"
