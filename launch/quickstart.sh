#!/usr/bin/env bash
# Makes the shipped dense base adaptive: installs into .venv, then runs every stage of configs/almanac_mini.py,
# evaluation, report and PyTorch export on the CPU. Safe to run again: it skips installed packages and complete stages.
#
# usage: launch/quickstart.sh [WORKDIR] [--config.field=value ...]      (default WORKDIR: runs/almanac_mini)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_environment.sh"

usage="usage: launch/quickstart.sh [WORKDIR] [--config.field=value ...]"
workdir=
options=()
for argument in "$@"; do
  case $argument in
    -h | --help) printf '%s\n' "$usage"; exit 0 ;;
    --*) options+=("$argument") ;;
    *)
      if [ -n "$workdir" ] || [ -z "$argument" ]; then say "quickstart.sh: unexpected argument '$argument'; $usage"; exit 2; fi
      workdir=$argument
      ;;
  esac
done

set_up_environment
export JAX_PLATFORMS=cpu
# XLA frees and allocates a step's memory in every step. If malloc keeps freed memory, in huge pages, a step takes about
# two thirds of the time.
keep=4000000000
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=$keep:glibc.malloc.trim_threshold=$keep}"
exec "$environment/bin/python" -P -m visor_jax run --config="$repository/configs/almanac_mini.py" \
  --workdir="${workdir:-$repository/runs/almanac_mini}" ${options[@]+"${options[@]}"}
