#!/usr/bin/env bash
# Measures on one GPU or one TPU host everything that only hardware shows, in at most nine minutes.
#
#   benchmarks/accelerator.sh [OUT] [--tiny] [--limit=SECONDS] [--parts=NAME,NAME]
#
# Parts run one after the other, the most important first, each within its own time limit; each writes
# OUT/accelerator/PART.json while it runs and when it is done (OUT: benchmarks/results). A part that fails or exceeds its
# limit says so in its file, and the next one starts. What a part leaves out for want of time is listed there. Weights
# are random. `--tiny` takes small shapes, also on a CPU; `--limit` replaces every part's limit; `--parts` runs these
# only. Exit status: 0 if every part was measured or skipped with a reason, 1 if one failed, 2 for a wrong argument.
# `python benchmarks/hardware_page.py` makes docs/hardware.md of the files in benchmarks/results/accelerator.
set -u
refuse() { echo "accelerator.sh: $1" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out="" limit="" only="" tiny=()
parts="kernels step prefill memory specialize"
for argument in "$@"; do
  case $argument in
    --tiny) tiny=(--tiny) ;;
    --limit=*)
      limit=${argument#--limit=}
      [[ $limit =~ ^[0-9]+(\.[0-9]+)?$ && $limit =~ [1-9] ]] || refuse "$argument: expected seconds, more than 0" ;;
    --parts=*)
      only=,${argument#--parts=},
      for part in ${only//,/ }; do
        [[ " $parts " == *" $part "* ]] || refuse "$argument: unknown part $part; expected one of $parts"
      done
      [[ $only =~ [a-z] ]] || refuse "$argument: expected one of $parts" ;;
    -*) refuse "$argument: expected OUT, --tiny, --limit=SECONDS or --parts=NAMES" ;;
    *)
      [[ -z $out ]] || refuse "$argument: expected one folder OUT, and $out was given before"
      out=$argument ;;
  esac
done
out=${out:-$here/results}
python=${PYTHON:-$here/../.venv/bin/python}
[[ -x $python ]] || python=python3
mkdir -p "$out/accelerator" || exit 1
cache=$(mktemp -d) && trap 'rm -rf "$cache"' EXIT # parts share compiled programs
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

failed=0
while read -r part seconds; do
  [[ -z $only || $only == *,$part,* ]] || continue
  file=$out/accelerator/$part.json
  rm -f "$file"
  timeout --kill-after=5 "${limit:-$seconds}" "$python" "$here/accelerator.py" "$part" --out="$file" \
    --seconds="${limit:-$seconds}" "${tiny[@]}" </dev/null
  status=$?
  if ((status)); then
    failed=1
    "$python" "$here/accelerator_files.py" failed "$file" "$part" "$status" "${limit:-$seconds}"
  fi
done <<'PARTS'
kernels 120
step 150
prefill 130
memory 50
specialize 80
PARTS
"$python" "$here/accelerator_files.py" summary "$out/accelerator"
exit $failed
