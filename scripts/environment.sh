# Sourced by the other scripts. Changes to the repository's root and sets $PYTHON to an
# interpreter with the packages in $REQUIREMENTS. Creates .venv and installs the packages if
# needed. If $PYTHON is already set, that interpreter is used without changes.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 ""; do
      if [ -z "$candidate" ]; then
        echo "Python 3.10 or newer is required but was not found." >&2
        exit 1
      fi
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    done
    echo "Creating .venv with $("$candidate" --version)."
    if ! "$candidate" -m venv .venv; then
      rm -rf .venv
      echo "Could not create .venv; see the message above." >&2
      echo "On Debian and Ubuntu, install python3-venv." >&2
      exit 1
    fi
  fi
  installed=.venv/installed-$(cat requirements.txt "$REQUIREMENTS" | cksum | cut -d' ' -f1)
  if [ ! -e "$installed" ]; then
    echo "Installing $REQUIREMENTS into .venv (several GB because of PyTorch; takes a few minutes)."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$REQUIREMENTS" || exit 1
    touch "$installed"
  fi
fi
export PYTHON

# Reads commands, one per line and without `python`, and runs one per core in parallel. For small
# networks, one thread per command is faster than all threads for one command at a time.
run_in_parallel() {
  OMP_NUM_THREADS=1 TQDM_DISABLE=1 \
    xargs -P "$(nproc)" -I{} bash -c 'echo "\$ python {}"; exec "$PYTHON" {}'
}
