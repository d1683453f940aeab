#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: kernels, graphs and streams, benchmarks, a
# memory checker, the engine. About ten minutes; every step has a limit of time and a verdict of its own.
#
#     tools/gpu_check.sh [--python PYTHON] [--bundle FOLDER] [--out FOLDER] [--limit SECONDS] [--only STEP,...] [--long]
#
# --python  needs a CUDA build of torch (default: python3)
# --bundle  what tools/gpu_bundle.sh made elsewhere: wheels, and the compiled module (default: build/gpu_bundle,
#           if it is there). Without it the packages must be installed, and nvcc, cmake and ninja compile.
# --out     gets log.txt, verdicts.tsv and the figures (default: runs/gpu_check). What has passed there is not run
#           again, as long as sources, device and torch are the same.
# --limit   seconds in all (default: 720); what does not fit is left for the next call
# --only    steps to run, beside those that prepare
# --long    also the steps that need models/SmolLM2-135M-Instruct, and the comparison with others
#
# Works in a copy of the checkout and leaves nothing in it or in the Python environment. Exit status: 0 all passed
# or skipped, 1 something failed, 2 wrong usage, 3 something is left.
set -u
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
. "$root/tools/gpu_steps.sh"

python=python3 bundle=$root/build/gpu_bundle out=$root/runs/gpu_check limit=720 only= long=
while [ $# -gt 0 ]; do
  case $1 in
    --long) long=yes && shift && continue ;;
    --python | --bundle | --out | --limit | --only) ;;
    *) echo "gpu_check: found $1, accepted: --python, --bundle, --out, --limit, --only, --long" >&2 && exit 2 ;;
  esac
  [ $# -ge 2 ] || { echo "gpu_check: $1: found nothing, accepted: a value" >&2 && exit 2; }
  case $1 in
    --python) python=$2 ;;
    --bundle) bundle=$2 && [ -d "$2" ] || { echo "gpu_check: --bundle: found no folder $2" >&2 && exit 2; } ;;
    --out) out=$2 ;;
    --limit) limit=$2 && [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || { echo "gpu_check: --limit: found $2, accepted: seconds" >&2 && exit 2; } ;;
    --only) only=$2 ;;
  esac
  shift 2
done
# The steps below; those that are indented are of --long.
known=$(sed -nE "s/^${long:+ *}step ([a-z]+) .*/\1/p" "$0")
for name in ${only//,/ }; do
  grep -qxF -- "$name" <<<"$known" || {
    echo "gpu_check: --only: found $name, accepted${long:+ with --long}: $(paste -sd , - <<<"$known")" >&2 && exit 2
  }
done
python=$(command -v "$python") || { echo "gpu_check: --python: found no such program" >&2 && exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
[ ! -d "$bundle" ] || bundle=$(cd "$bundle" && pwd)
deadline=$((SECONDS + limit))
steps=()

# The copy, without what is large or belongs to the checkout alone.
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir -p "$tree" "$work/site"
tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs --exclude=./models \
  --exclude=__pycache__ --exclude='./.*_cache' -cf - . | tar -C "$tree" -xf - || exit 2
[ ! -d "$root/models" ] || ln -s "$root/models" "$tree/models"
cd "$tree" || exit 2
export PYTHONPATH=$tree:$work/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin GAPO_GPU_CHECK_OUT=$out

# What has passed counts only for these sources, this torch and this device.
sources=$(bash tools/gpu_sources.sh . gapo_mega csrc tests benchmarks tools)
identity="# $sources $("$python" -c 'import sys
try:
    import torch
    device = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "none"
    print("python", sys.version.split()[0], "torch", torch.__version__, "device", device)
except ImportError as error:
    print("no torch:", error)' 2>/dev/null)"
if [ "$(head -n 1 "$out/verdicts.tsv" 2>/dev/null)" != "$identity" ]; then
  echo "$identity" >"$out/verdicts.tsv"
  : >"$out/log.txt"
fi
# Preparation is done anew each time: the copy is.
sed -i -E '/^(packages|module)\t/d' "$out/verdicts.tsv"

pytest=("$python" -m pytest -q -p no:cacheprovider -m gpu)
asked=$only

only=
step packages 120 "" bash tools/gpu_packages.sh "$python" "$bundle" "$work/site"
step module 420 "" bash tools/gpu_module.sh "$python" "$bundle" "$tree"
only=$asked
step collect 120 module "$python" -m pytest -q -p no:cacheprovider --collect-only tests/gpu \
  tests/engine/megatron/gradients/test_reference.py tests/engine/megatron/gradients/test_metric.py
step device 60 module "$python" tools/gpu_device.py
step stack 60 "module device" "$python" benchmarks/device_stack.py --out "$out/stack.json"
step kernels 180 "module device" "${pytest[@]}" tests/gpu/test_every_kernel.py tests/gpu/test_ops_cuda.py
step capture 120 "module device" "${pytest[@]}" tests/gpu/test_capture.py
step benchmark 240 "module device" "$python" benchmarks/kernels.py --device cuda --rows 2,8 --sizes 18,22,26 \
  --rounds 5 --out "$out"
step memcheck 180 "module device" bash tools/gpu_memcheck.sh "${pytest[@]}" tests/gpu/test_every_kernel.py
step frozen 60 "module device" "${pytest[@]}" tests/gpu/test_frozen.py
step weights 120 "module device" "${pytest[@]}" tests/gpu/test_weight_transfer.py
step layers 90 "module device" "${pytest[@]}" tests/gpu/test_transformer_engine.py
step engine 240 "module device" "$python" -m pytest -q -p no:cacheprovider \
  tests/engine/megatron/gradients/test_reference.py tests/engine/megatron/gradients/test_metric.py
if [ -n "$long" ]; then
  demo=(--config examples/demo.yaml)
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  step model 5 "module device" bash -c "test -f models/SmolLM2-135M-Instruct/config.json ||
    { echo 'no models/SmolLM2-135M-Instruct: make demo converts it'; exit $SKIP; }"
  step train 300 model "$python" -m gapo_mega.cli train "${demo[@]}" --nproc "$gpus" steps=1 \
    output_dir="$work/train" data.heldout_prompts="$((4 * gpus))"
  step throughput 300 model "$python" -m gapo_mega.cli benchmark throughput "${demo[@]}" --nproc "$gpus" \
    --steps 2 --out "$out/throughput.json"
  step strategies 300 model "$python" -m gapo_mega.cli benchmark step "${demo[@]}" --nproc "$gpus" \
    model.dtype=bf16 --out "$out/step.json"
  step peers 600 "module device" "$python" benchmarks/peers.py --out "$out/peers.json"
fi

summary
status=$?
echo "written: $out"
exit $status
