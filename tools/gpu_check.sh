#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build with CUDA, GPU tests, one training step, benchmarks.
#
#     tools/gpu_check.sh [PYTHON]
#
# Needs nvcc and a CUDA build of torch (installed beforehand; nothing is installed over it). Logs go to
# runs/gpu_check. A table comes last; the exit status is 0 only if no line of it says FAILED.
set -u
cd "$(dirname "$0")/.." || exit 2

python=${1:-python3}
logs=runs/gpu_check
model=models/SmolLM2-135M-Instruct
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 2
if [ "$gpus" -eq 0 ]; then
  echo "gpu_check: no CUDA device (torch.cuda.device_count() is 0)" >&2
  exit 2
fi
rm -rf "$logs" && mkdir -p "$logs"
table=()
failed=0

# step NAME COMMAND...: runs it, logs it, remembers how it went and how long it took.
step() {
  local name=$1 start=$SECONDS result=passed
  shift
  echo "== $name: $*"
  if ! "$@" >"$logs/$name.log" 2>&1; then
    result=FAILED
    failed=1
    tail -n 30 "$logs/$name.log"
  fi
  table+=("$(printf '%-12s %-8s %5d s  %s' "$name" "$result" $((SECONDS - start)) "$logs/$name.log")")
}

skip() {
  table+=("$(printf '%-12s %-8s %5d s  %s' "$1" skipped 0 "$2")")
}

step build env GAPO_CUDA=ON "$python" -m pip install --no-deps --editable .
step tests "$python" -m pytest -m gpu tests/gpu
# Every kernel once under the checks for memory, races and barriers; not what measures or captures.
sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck synccheck; do
  if [ -n "$sanitizer" ]; then
    step "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m pytest -m gpu tests/gpu \
      -k "number_of_rows or pieces or different_types or inverse_roots or combine_in \
          or (equals_the_hosts and generic) or many_rows"
  else
    skip "$tool" "no compute-sanitizer on PATH or in CUDA_HOME/bin"
  fi
done
# The engine takes the GPU where there is one: gradients, metric and updates against float64.
step engine "$python" -m pytest tests/engine/megatron/gradients/test_reference.py \
  tests/engine/megatron/gradients/test_strategies.py tests/engine/megatron/gradients/test_metric.py
if [ -f "$model/config.json" ]; then
  step train "$python" -m gapo_mega.cli train --config examples/demo.yaml --nproc "$gpus" steps=1 \
    output_dir="$logs/train" data.heldout_prompts="$((4 * gpus))"
  step throughput "$python" -m torch.distributed.run --nproc_per_node "$gpus" benchmarks/throughput.py \
    --config examples/demo.yaml --steps 2 --out "$logs/throughput.json"
  step strategies "$python" -m gapo_mega.cli benchmark step --config examples/demo.yaml --nproc "$gpus" \
    model.dtype=bf16 --out "$logs/step.json"
else
  skip train "no $model: run 'make demo' once"
  skip throughput "no $model: run 'make demo' once"
  skip strategies "no $model: run 'make demo' once"
fi
step kernels "$python" benchmarks/kernels.py --device cuda --out "$logs"
step peers "$python" benchmarks/peers.py --out "$logs/peers.json"

echo
"$python" -c 'import torch
from gapo_mega import ops
print(torch.cuda.get_device_name(0), "x", torch.cuda.device_count(), "| torch", torch.__version__, "|", ops.info())'
printf '%s\n' "${table[@]}"
exit "$failed"
