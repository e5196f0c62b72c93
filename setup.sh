#!/bin/sh
# Sets up the virtual environment, and the Debian packages that it needs. Called by make; safe to run again.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-.venv}

say() { printf '%s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "setup: $python is not there. Install Python 3.11 or newer: apt-get install python3"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "setup: $("$python" --version) is too old: payterm needs Python 3.11 or newer (make PYTHON=python3.13)"; exit 1; }

# A package counts as there when what it is for works, however it came to be there.
have() {
    case $1 in
        python3-venv) "$python" -c 'import venv, ensurepip' 2>/dev/null ;;
        e2fsprogs) command -v mkfs.ext4 >/dev/null || test -x /usr/sbin/mkfs.ext4 ;;
        strace | swig | gcc) command -v "$1" >/dev/null ;;
        python3-dev) "$python" -c 'import pathlib, sysconfig, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ;;
        *) dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed' ;;
    esac
}

missing=
for package in $(sed 's/#.*//' debian-packages.txt); do
    have "$package" || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else
        say "setup: these Debian packages are missing:$missing"
        say "setup: run   sudo apt-get update && sudo apt-get install --no-install-recommends$missing   and then make again"
        exit 1
    fi
    say "setup: installing$missing"
    $as_root apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -qq --no-install-recommends $missing >/dev/null
fi

"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --use-pep517 --constraint constraints.txt --editable '.[sim,dev]'
say "setup: ready in $venv"
