#!/usr/bin/env bash
# Installs into .venv like quickstart.sh, then runs the formatter's check, the linter, the type checker and the tests.
# Everything runs, also after a failure; the exit status is 1 if anything failed. The tests run in one process per core,
# at most four, because each takes about 4 GB; `-n 0` runs them in a single process, for instance under a debugger.
#
# With --transformers=VERSION only the export's tests run (or those given as tests/...), under this version of
# transformers, in a separate environment on top of .venv. TRANSFORMERS_TESTS=DIR adds the tests of transformers from a
# checkout of its repository.
#
# With --cluster only the tests on a real Slurm cluster of this machine run (some minutes). Where Slurm is missing, root
# gets Debian's packages slurm-wlm and munge installed first; their services are stopped, the tests start their own.
#
# With --clients only the launchers' tests run, the slow ones too, with xpk and SkyPilot themselves. Each gets an
# environment of its own, because what they need contradicts requirements.txt.
#
# usage: launch/test.sh [--all | --cluster | --clients] [--transformers=VERSION] [pytest arguments ...]   (--all: the slow tests too)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_environment.sh"

tests=(-m "not slow")
arguments=()
transformers=
cluster=
clients=
export_tests=(tests/export)
for argument in "$@"; do
  case $argument in
    -h | --help) printf '%s\n' "usage: launch/test.sh [--all | --cluster | --clients] [--transformers=VERSION] [pytest arguments ...]"
      exit 0 ;;
    --all) tests=() ;;
    --cluster) cluster=yes ;;
    --clients) clients=yes ;;
    --transformers=*) transformers=${argument#*=} ;;
    tests/*) export_tests=() arguments+=("$argument") ;;
    *) arguments+=("$argument") ;;
  esac
done

if [[ " $* " == *" --transformers="* && ! $transformers =~ ^[0-9]+(\.[0-9a-z]+)+$ ]]; then
  say "test.sh: --transformers=$transformers: expected a version, such as 5.3.0"
  exit 2
fi

cores=$(nproc 2>/dev/null || echo 1)
install_slurm() {
  if command -v sbatch >/dev/null && command -v munge >/dev/null; then
    return
  fi
  if [ "$EUID" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "--cluster needs Slurm and munge; on Debian: sudo apt-get install --no-install-recommends slurm-wlm munge"
  fi
  say "installing Slurm: apt-get install slurm-wlm munge"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
  local service
  for service in slurmd slurmctld munge; do
    service "$service" stop >/dev/null 2>&1 || true # not running, or no service manager
  done
}

install_clients() {
  local package folder
  for package in "xpk==1.16.0" "skypilot[gcp]==0.14.1"; do
    folder=$repository/.venv-clients-${package%%[=[]*}
    if [ "$(cat -- "$folder/installed" 2>/dev/null)" != "$package" ]; then
      say "installing $package into $folder"
      "$environment/bin/python" -m venv --without-pip "$folder"
      "$environment/bin/python" -m pip --disable-pip-version-check --no-input --python "$folder/bin/python" install \
        --quiet "$package"
      printf '%s' "$package" >"$folder/installed"
    fi
    PATH=$PATH:$folder/bin
  done
}

tests+=(-n "$((cores < 4 ? cores : 4))" --dist=loadfile)  # module fixtures are built once

set_up_environment
export JAX_PLATFORMS=cpu
cd -- "$repository"

if [ -n "$transformers" ]; then
  set_up_layer "$transformers"
  exec "$layer/bin/python" -m pytest "${tests[@]}" ${export_tests[@]+"${export_tests[@]}"} \
    ${arguments[@]+"${arguments[@]}"}
fi

if [ -n "$cluster" ]; then
  install_slurm
  exec "$environment/bin/python" -m pytest -m cluster ${arguments[@]+"${arguments[@]}"}
fi

if [ -n "$clients" ]; then
  install_clients
  exec "$environment/bin/python" -m pytest tests/launching ${arguments[@]+"${arguments[@]}"}
fi

failed=()
check() {
  local name=$1
  shift
  say "--- $name"
  "$@" || failed+=("$name")
}
check "ruff format" "$environment/bin/python" -m ruff format --check .
check "ruff check" "$environment/bin/python" -m ruff check .
check "types" "$environment/bin/python" -m basedpyright --level error
check "tests" "$environment/bin/python" -m pytest "${tests[@]}" ${arguments[@]+"${arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
  printf -v names ', %s' "${failed[@]}"
  fail "failed: ${names:2}"
fi
say "all passed"
