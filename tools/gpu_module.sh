#!/usr/bin/env bash
# A step of tools/gpu_check.sh: puts the compiled module into TREE, from the bundle or by compiling, and loads it.
#
#     tools/gpu_module.sh PYTHON BUNDLE TREE
set -u
python=$1 bundle=$2 tree=$3
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || exit 1
prebuilt=$bundle/module/_native$suffix
target=$tree/gapo_mega/ops
# One that lies in the checkout may be of other sources.
rm -f "$target"/_native*.so
if [ -f "$prebuilt" ]; then
  if [ "$(cat "$bundle/module/sources")" != "$(bash tools/gpu_sources.sh . csrc CMakeLists.txt)" ]; then
    echo "the bundle's module was made from other sources than csrc: make the bundle again"
    exit 1
  fi
  cp "$prebuilt" "$target/" && how=prebuilt || exit 1
elif command -v nvcc >/dev/null; then
  # By cmake alone: pip would build in an environment of its own, which it fetches.
  how=compiled
  cmake -S . -B "$tree/build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGAPO_CUDA=ON \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$tree/build/cmake" && cp "$tree"/build/cmake/_native*.so "$target/" || exit 1
else
  echo "no _native$suffix in $bundle/module, and no nvcc on PATH or in CUDA_HOME/bin to compile it"
  exit 1
fi
"$python" -c "
from gapo_mega import ops
info = ops.info()
assert info['has_cuda'], info
print('$how:', ', '.join(info['cuda_archs']))"
