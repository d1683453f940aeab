#!/usr/bin/env bash
# A step of tools/gpu_check.sh: unpacks the wheels of a bundle into SITE, which PYTHONPATH holds, and tells which
# packages are missing all the same.
#
#     tools/gpu_packages.sh PYTHON BUNDLE SITE
set -u
python=$1 bundle=$2 site=$3
if compgen -G "$bundle/wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$bundle"/wheels/*.whl || exit 1
fi
nvidia-smi 2>/dev/null || echo "no nvidia-smi"
"$python" tools/gpu_requirements.py
