#!/usr/bin/env bash
# GAPO on Mistral-7B-SFT with the hyper-parameters of the paper (gapo_mistral7b.yaml beside this file).
#
#   bash examples/gapo_mistral7b.sh [--dry-run] [key=value ...]
#   torchrun --nnodes N --nproc_per_node G examples/gapo_mistral7b.sh [--dry-run] [key=value ...]
#   sbatch examples/slurm/gapo_mistral7b.sbatch
#
# Environment: TP, PP (tensor and pipeline parallel size; data parallelism takes the rest), MODEL (Hugging Face
# directory or hub name), REWARD and COST (likewise: the two score models), OUTPUT_DIR; and for the bash form
# NPROC_PER_NODE (default: the GPUs of this node), MAX_RESTARTS (of workers, by torchrun; default 0), PYTHON (the
# interpreter; default python3).
#
# The bash form is one node by default. On several it runs once on each, with NNODES, NODE_RANK (0 to NNODES - 1),
# MASTER_ADDR (the node of rank 0) and MASTER_PORT (default 29500). As the one task of every node of an srun, it
# has these four from Slurm, but for those that are set.
#
# This file is two programs in one, because torchrun hands its script to Python:
# - bash reads the three quotes and the colon below as ":", a command that does nothing, runs what follows,
#   and becomes torchrun at "exec". The Python part is a here-document to it, never run.
# - Python reads all lines from the three quotes to the next three as a text, and runs what comes after.
''':'
set -euo pipefail

fail() {
  printf "error: %s\\n" "$1" >&2
  exit 2
}

# In arithmetic, bash runs commands that a variable's text names: digits only.
for name in NNODES NPROC_PER_NODE NODE_RANK MASTER_PORT MAX_RESTARTS \
  SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS SLURM_NODEID SLURM_JOB_ID; do
  if [[ "$name" = SLURM_* ]]; then longest=18; else longest=6; fi
  if [[ -n "${!name:-}" && ! "${!name}" =~ ^[0-9]{1,$longest}$ ]]; then
    fail "$name: found '${!name}', accepted: a number (digits only)"
  fi
done

python="${PYTHON:-python3}"
nodes="$((10#${NNODES:-${SLURM_STEP_NUM_NODES:-1}}))"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
processes="$((10#${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}))"

for argument in "$@"; do
  if [ "$argument" = "--dry-run" ]; then
    exec "$python" "$0" --world "$((nodes * processes))" "$@"
  fi
done

# After SIGTERM (a time limit) the workers write a checkpoint; torchrun would kill them after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
workers=(--nproc-per-node "$processes" --max-restarts "$((10#${MAX_RESTARTS:-0}))" "$0" "$@")

if [ "$nodes" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  exec "$python" -m gapo_mega.runs.local_torchrun "${workers[@]}" # listens on this node's loopback alone
fi

rank="${NODE_RANK:-}" address="${MASTER_ADDR:-}" port="${MASTER_PORT:-29500}"
if [ "$nodes" = 1 ]; then
  rank="${rank:-0}" address="${address:-127.0.0.1}"
elif [ -n "${SLURM_STEP_NUM_NODES:-}" ]; then
  tasks="${SLURM_STEP_NUM_TASKS:-$SLURM_STEP_NUM_NODES}"
  if [ "$((10#$tasks))" != "$((10#$SLURM_STEP_NUM_NODES))" ]; then
    fail "SLURM_STEP_NUM_TASKS: found $tasks on $SLURM_STEP_NUM_NODES nodes, accepted: one task a node, which starts the others (srun --ntasks-per-node=1)"
  fi
  rank="${rank:-${SLURM_NODEID:-}}"
  if [ -z "$address" ]; then
    hosts="$(scontrol show hostnames "${SLURM_STEP_NODELIST:-}")"
    read -r address <<<"$hosts" # the first; "| head" would end scontrol, and with it this script, by SIGPIPE
  fi
  port="${MASTER_PORT:-$((20000 + 10#${SLURM_JOB_ID:-0} % 20000))}"
fi
if [ -z "$rank" ] || [ "$((10#$rank))" -ge "$nodes" ]; then
  fail "NODE_RANK: found '$rank' with NNODES $nodes, accepted: 0 to $((nodes - 1)), another one on every node"
fi
if [ -z "$address" ]; then
  fail "MASTER_ADDR: found '' with NNODES $nodes, accepted: the host name or address of the node with NODE_RANK 0"
fi
exec "$python" -m torch.distributed.run --nnodes "$nodes" --node-rank "$((10#$rank))" \
  --master-addr "$address" --master-port "$((10#$port))" "${workers[@]}"

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
