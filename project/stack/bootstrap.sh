#!/bin/sh
# bootstrap.sh VENV LOCK [PYTHON]: finds a Python for bootstrap.py, where there is work for it.
set -eu
venv=$1 lock=$2 python=${3:-}

if [ -x "$venv/bin/python" ] && cmp -s "$lock" "$venv/$lock"; then
    exit 0
fi

# A Python that can make virtual environments, else any that fits: bootstrap.py then says
# which package it lacks.
for needed in ", ensurepip" ""; do
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        [ -z "$python" ] || break
        if "$candidate" -c "import sys$needed
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; then
            python=$candidate
        fi
    done
done
if [ -z "$python" ]; then
    echo "llmtasks: Python 3.11, 3.12 or 3.13 is needed and none was found: install one (Debian, Ubuntu: apt-get install python3 python3-venv) or run make PYTHON=/path/to/python" >&2
    exit 1
fi
exec "$python" "${0%.sh}.py" "$venv" "$lock"
