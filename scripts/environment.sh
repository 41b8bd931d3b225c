# Sourced by the other scripts: goes to the repository's root and sets $PYTHON to an interpreter that has the packages
# of the requirements file in $REQUIREMENTS. Makes .venv and installs into it where that is needed.
# With PYTHON=... in the environment, that interpreter is used as it is.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 ""; do
      [ -n "$candidate" ] || { echo "Python 3.10 or newer is needed; none was found." >&2; exit 1; }
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    done
    echo "Making .venv with $("$candidate" --version)."
    if ! "$candidate" -m venv .venv; then
      rm -rf .venv
      echo "That failed. On Debian and Ubuntu the package python3-venv is missing; else see the message above." >&2
      exit 1
    fi
  fi
  installed=.venv/installed-$(cat requirements.txt "$REQUIREMENTS" | cksum | cut -d' ' -f1)
  if [ ! -e "$installed" ]; then
    echo "Installing $REQUIREMENTS into .venv (PyTorch brings several GB; a few minutes)."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$REQUIREMENTS" || exit 1
    touch "$installed"
  fi
fi
export PYTHON

# Runs the commands it reads, `python ...` without that word, one a line, as many at a time as there are cores: one
# thread each is faster than one command after the other on all of them, since the networks are small.
side_by_side() {
  OMP_NUM_THREADS=1 TQDM_DISABLE=1 xargs -P "$(nproc)" -I{} bash -c 'echo "\$ python {}"; exec "$PYTHON" {}'
}
