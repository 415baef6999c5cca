#!/usr/bin/env bash
# Runs all that needs a card, on one card, in at most seven minutes: the tests with several NCCL ranks, the step of one
# rank of 64 beside plain FSDP2, and the headline on NCCL. No network; torch, lightning, accelerate, transformers,
# pytest and rich are installed already. What it measures goes to FOLDER, a summary onto the end of the screen.
#
#   tests/gpu/run.sh FOLDER
#
# REHEARSE_GPU=1 runs the same on CPUs, with small models and gloo.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?names the folder for results}")
mkdir -p "$out"
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
workloads="gpt2-xl llama-1b" compile=--compile
[ "${REHEARSE_GPU:-}" = 1 ] && export CUDA_VISIBLE_DEVICES= && workloads="gpt2-tiny" compile=

# Under the multi-process service ranks run side by side; without it the card gives them slices of time.
service=$(mktemp -d)
start_service() {
    export CUDA_MPS_PIPE_DIRECTORY=$service/pipe CUDA_MPS_LOG_DIRECTORY=$service/log
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    timeout 20 nvidia-cuda-mps-control -d && return
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    return 1
}
end_service() {
    [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | timeout 20 nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}
trap 'end_service >/dev/null 2>&1; rm -rf "$service"' EXIT

summary=()
# Runs NAME for at most LIMIT seconds; its screen goes to a file, too.
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "=== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    summary+=("$name: $([ "$code" = 0 ] && echo passed || echo "FAILED, code $code"), $((SECONDS - start)) s")
}

{
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$python" - <<'PYTHON'
from importlib.metadata import version

import torch

names = ("torch", "lightning", "pytorch-lightning", "accelerate", "transformers")
found = []
for name in names:
    try:
        found.append(f"{name} {version(name)}")
    except ImportError:
        pass
if torch.cuda.is_available():
    found += [f"CUDA {torch.version.cuda}", "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))]
print(", ".join(found))
PYTHON
    git rev-parse HEAD 2>/dev/null
    date -u +%F
} >"$out/versions.txt"

mps="no multi-process service: time slices"
start_service && mps="ranks side by side under the multi-process service"
echo "$mps" >>"$out/versions.txt"
part tests 210 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider --color=no
end_service
part step 120 "$python" benchmarks/gpu.py $workloads $compile --json "$out/step.jsonl"
[ "${REHEARSE_GPU:-}" = 1 ] ||
    part headline 90 "$python" -m lightning_mics bench headline --device cuda --fresh --results "$out/headline-cuda.jsonl"

echo "=== summary"
cat "$out/versions.txt"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
grep -E "^(FAILED|ERROR)|passed|failed" "$out/tests.txt" | tail -12
! grep -q FAILED "$out/summary.txt"
