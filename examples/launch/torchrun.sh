#!/usr/bin/env bash
# Starts an example on several nodes with torchrun. Run this on every node, at about the same time:
#
#   NODES=4 GPUS=8 HEAD=node-0 examples/launch/torchrun.sh examples/trainer_gpt2.py --num-nodes 4 --devices 8 --shard-size 8
#
# NODES  number of nodes
# GPUS   ranks on each node
# HEAD   name or address of one of the nodes, which the others can reach
# PORT   a free port there (29500 if not given)
set -euo pipefail

: "${NODES:?set NODES to the number of nodes}"
: "${GPUS:?set GPUS to the number of ranks on each node}"
: "${HEAD:?set HEAD to the name of one of the nodes}"

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-mics}" "$@"
