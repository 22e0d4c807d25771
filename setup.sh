# Sourced by speedrun.sh and test.sh: make .venv once, install the given requirements file, set PYTHON.
# torch comes first and by its exact version, so that pip can use a wheel that is stored on this machine.
requirements=$1
if [ ! -x .venv/bin/python ]; then
    "${BOOTSTRAP_PYTHON:-python3}" -m venv .venv
fi
PYTHON=$PWD/.venv/bin/python
stamp=.venv/installed-$requirements
if ! cmp -s <(cat requirements*.txt) "$stamp" 2>/dev/null; then
    echo "installing $requirements into .venv (once)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements*.txt > "$stamp"
fi
