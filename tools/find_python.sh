#!/usr/bin/env bash
# Prints the newest Python on PATH that has everything `make` needs, and says on stderr what it is and why not another.
#
#     tools/find_python.sh TORCH [PIP OPTION...]
#
# "Everything": it starts, it is one of the versions that the tests run with, it makes virtual environments, it has
# the headers that the extension is compiled with, and pip finds torch==TORCH for it. With an --extra-index-url among
# the options, pip also has to find the CPU build (TORCH+cpu): a Python without one would download gigabytes of
# CUDA. Where no Python has a CPU build, the newest one is taken.
set -u

torch=$1
shift
accepted="3.13 3.12 3.11 3.10"
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

say() { echo "find_python: $*" >&2; }

# Version, headers: what Python itself tells.
probe='import os, sys, sysconfig
print("%d.%d" % sys.version_info[:2])
print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'

second_choice=""
for version in $accepted; do
  for name in "python$version" python3 python; do
    python=$(command -v "$name") || continue
    found=$("$python" -c "$probe" 2>/dev/null) || continue
    [ "${found%%$'\n'*}" = "$version" ] || continue
    if [ "${found##*$'\n'}" != True ]; then
      say "Python $version ($python): no headers (Python.h)"
      continue
    fi
    rm -rf "$scratch/venv"
    if ! "$python" -m venv "$scratch/venv" >/dev/null 2>&1; then
      say "Python $version ($python): does not make virtual environments (python$version-venv?)"
      continue
    fi
    offered=$("$scratch/venv/bin/python" -m pip index versions torch "$@" 2>/dev/null | grep '^Available versions:')
    offered=" ${offered#*:},"
    case "$*" in
      *--extra-index-url*) wanted="$torch+cpu" ;;
      *) wanted="$torch" ;;
    esac
    case "$offered" in
      *" $wanted,"*)
        say "taking Python $version ($python), the newest here that has everything"
        echo "$python"
        exit 0
        ;;
      *" $torch,"*)
        say "Python $version ($python): no CPU build of torch $torch, which is a tenth of the size"
        [ -n "$second_choice" ] || second_choice="$version $python"
        ;;
      *) say "Python $version ($python): pip finds no torch $torch" ;;
    esac
    break
  done
done
if [ -n "$second_choice" ]; then
  say "taking Python ${second_choice/ / (}): no Python here has a CPU build of torch"
  echo "${second_choice#* }"
  exit 0
fi
say "no Python on PATH has everything; accepted: one of $accepted; name another with make PYTHON=..."
exit 1
