# Sourced by quickstart.sh and test.sh. Creates .venv in the repository if it is missing, and installs requirements.txt
# and the package into it once per version of these files; a stamp in .venv holds their checksum.
#
# Defines: repository, environment (absolute paths), set_up_environment, and set_up_layer, which adds another version of
# transformers. Needs Python 3.11 or 3.12 only.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
environment=$repository/.venv

say() { printf '%s\n' "$*" >&2; }
fail() { say "$(basename -- "$0"): $*"; exit 1; }

# Runs the interpreter, because a name on PATH may be a shim that does not work.
is_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in python3.11 python3.12 python3 python; do
    if is_python "$name"; then command -v "$name"; return; fi
  done
  fail "needs Python 3.11 or 3.12, and found neither python3.11 nor python3.12 nor another python of these versions" \
    "on PATH; on Debian: apt-get install python3.11-venv"
}

# Keeps an environment that works, completes one that was interrupted, and never deletes one.
make_environment() {
  local inside=$environment/bin/python python
  if is_python "$inside"; then
    if "$inside" -m pip --version >/dev/null 2>&1; then return; fi
  elif [ -e "$inside" ] || [ -L "$inside" ]; then
    fail "$inside does not run, or is neither Python 3.11 nor 3.12; remove $environment and start again"
  fi
  python=$(find_python)
  say "making $environment with $python"
  if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$environment"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    # Debian ships ensurepip in a separate package; the system's pip can install pip into the environment too.
    "$python" -m venv --without-pip "$environment"
    "$python" -m pip --python "$inside" install --quiet pip
  else
    fail "$python has neither ensurepip nor pip, so it cannot make an environment; on Debian:" \
      "apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  fi
}

# Prints the expected stamp: the checksum of the two files and of the repository's path.
wanted() { { cat -- "$repository/requirements.txt" "$repository/pyproject.toml"; printf '%s' "$repository"; } | sha256sum; }

set_up_environment() {
  local stamp=$environment/installed.sha256
  # Two scripts that start together take turns installing. The lock is released before anything else runs.
  exec 9<"$repository/requirements.txt"
  if command -v flock >/dev/null; then flock 9; fi
  make_environment
  if [ "$(cat -- "$stamp" 2>/dev/null)" != "$(wanted)" ]; then
    rm -f -- "$stamp"
    say "installing requirements.txt into $environment: some minutes and about 2.5 GB, only this once"
    local pip=("$environment/bin/python" -m pip --disable-pip-version-check --no-input install --quiet)
    "${pip[@]}" --requirement "$repository/requirements.txt"
    "${pip[@]}" --no-deps --no-build-isolation --editable "$repository"
    wanted >"$stamp"
  fi
  exec 9<&-
}

purelib() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Creates .venv-transformers-VERSION and sets `layer` to its path: an environment with this version of transformers and the
# packages of its tests, which falls back to .venv for other packages. pip never changes .venv here.
set_up_layer() {
  local version=$1
  layer=$repository/.venv-transformers-$version
  local stamp=$layer/installed.sha256 below
  if [ "$(cat -- "$stamp" 2>/dev/null)" = "$(wanted)" ]; then return; fi
  say "installing transformers $version into $layer, on top of $environment"
  rm -f -- "$stamp"
  "$environment/bin/python" -m venv --without-pip "$layer"
  below=$(purelib "$environment")
  "$layer/bin/python" -c '
import pathlib, sys, sysconfig
line = f"import site; site.addsitedir({sys.argv[1]!r})\n"
pathlib.Path(sysconfig.get_path("purelib"), "below.pth").write_text(line)' "$below"
  "$layer/bin/python" -m pip --disable-pip-version-check --no-input install --quiet \
    "transformers==$version" accelerate httpx parameterized peft
  wanted >"$stamp"
}
