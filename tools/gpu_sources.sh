#!/usr/bin/env bash
# Prints a hash of the source files below ROOT/FOLDER..., by content and path, and of nothing that is made there.
#
#     tools/gpu_sources.sh ROOT FOLDER...
set -eu
cd "$1"
shift
LC_ALL=C find "$@" -type f ! -name '*.so' ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum |
  cut -c 1-16
