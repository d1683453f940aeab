#!/usr/bin/env bash
# GAPO on Mistral-7B-SFT with the hyper-parameters of the paper (gapo_mistral7b.yaml beside this file).
#
#   bash examples/gapo_mistral7b.sh [--dry-run] [key=value ...]
#   torchrun --nnodes N --nproc_per_node G examples/gapo_mistral7b.sh [--dry-run] [key=value ...]
#   sbatch examples/slurm/gapo_mistral7b.sbatch
#
# Environment: TP, PP (tensor and pipeline parallel size; data parallelism takes the rest), MODEL (Hugging Face
# directory or hub name), REWARD and COST (likewise: the two score models), OUTPUT_DIR; and for the bash form
# NNODES, NPROC_PER_NODE (default: the GPUs of this node), NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON (the
# interpreter; default python3).
#
# This file is two programs in one, because torchrun hands its script to Python:
# - bash reads the three quotes and the colon below as ":", a command that does nothing, runs what follows,
#   and becomes torchrun at "exec". The Python part is a here-document to it, never run.
# - Python reads all lines from the three quotes to the next three as a text, and runs what comes after.
''':'
set -euo pipefail

# In arithmetic, bash runs commands that a variable's text names: digits only.
for name in NNODES NPROC_PER_NODE NODE_RANK MASTER_PORT; do
  if [[ -n "${!name:-}" && ! "${!name}" =~ ^[0-9]{1,6}$ ]]; then
    printf "error: %s: found '%s', accepted: a number (digits only)\\n" "$name" "${!name}" >&2
    exit 2
  fi
done

python="${PYTHON:-python3}"
nodes="${NNODES:-1}"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
processes="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"

for argument in "$@"; do
  if [ "$argument" = "--dry-run" ]; then
    exec "$python" "$0" --world "$((10#$nodes * 10#$processes))" "$@"
  fi
done

# After SIGTERM (a time limit) the workers write a checkpoint; torchrun would kill them after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

if [ "$nodes" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  rendezvous=(--standalone --local-addr 127.0.0.1)
else
  rendezvous=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}")
  rendezvous+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" "$0" "$@"

: <<'# the end of Python'
'''
import json
import os
import sys
from pathlib import Path

from gapo_mega.cli import main

if __name__ == "__main__":  # writers of checkpoints are spawned, and load this file again
    settings = []
    for name, key in (("TP", "parallel.tensor"), ("PP", "parallel.pipeline")):
        if os.environ.get(name):
            settings.append(f"{key}={os.environ[name]}")
    for name, key in (
        ("MODEL", "model.path"),
        ("REWARD", "objectives.0.options.model"),
        ("COST", "objectives.1.options.model"),
        ("OUTPUT_DIR", "output_dir"),
    ):
        if os.environ.get(name):
            settings.append(f"{key}={json.dumps(os.environ[name])}")  # quoted: a text, whatever is in it
    config = Path(__file__).resolve().with_suffix(".yaml")
    sys.argv[1:] = ["train", "--config", str(config), *settings, *sys.argv[1:]]
    main()
# the end of Python
