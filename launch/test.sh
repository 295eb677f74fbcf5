#!/usr/bin/env bash
# Installs into .venv like quickstart.sh, then runs the formatter's check, the linter, the type checker and the tests.
# Everything runs, also after a failure; the exit status is 1 if anything failed.
#
# usage: launch/test.sh [--all] [pytest arguments ...]      (--all: the slow tests too)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_environment.sh"

tests=(-m "not slow")
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) printf '%s\n' "usage: launch/test.sh [--all] [pytest arguments ...]"; exit 0 ;;
    --all) tests=() ;;
    *) arguments+=("$argument") ;;
  esac
done

set_up_environment
export JAX_PLATFORMS=cpu
cd -- "$repository"

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
check "tests" "$environment/bin/python" -m pytest ${tests[@]+"${tests[@]}"} ${arguments[@]+"${arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
  printf -v names ', %s' "${failed[@]}"
  fail "failed: ${names:2}"
fi
say "all passed"
