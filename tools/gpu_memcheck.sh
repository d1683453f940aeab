#!/usr/bin/env bash
# A step of tools/gpu_check.sh: a command under compute-sanitizer's memcheck. Status 77, a skip, where there is none
# or it refuses the device.
#
#     tools/gpu_memcheck.sh COMMAND...
set -u
sanitizer=$(command -v compute-sanitizer) || { echo "no compute-sanitizer on PATH or in CUDA_HOME/bin" && exit 77; }
said=$(mktemp) && trap 'rm -f "$said"' EXIT
# Without torch's cache every tensor is an allocation of its own, whose ends are watched. Calls that fail on purpose,
# as torch's probes of the driver do, are no findings.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 "$@" 2>&1 |
  tee "$said"
status=${PIPESTATUS[0]}
if grep -qiE 'device not supported|not supported on this|unable to (attach|initialize)|insufficient permission' "$said"; then
  echo "refused: $(grep -iE 'not supported|unable to|permission' "$said" | head -n 1)"
  exit 77
fi
grep -E 'ERROR SUMMARY|[0-9]+ (passed|failed)' "$said" | tail -n 2 | tr '\n' ' '
echo
exit "$status"
