#!/bin/sh
# Make .venv and install the package into it, editable, with one extra.
#
#   tools/bootstrap.sh EXTRA        EXTRA is demo or dev
#
# Needs a Python from 3.11 on that can make virtual environments, and a package
# index. Nothing outside the checkout is changed, with one exception: as root on
# Debian a missing python3-venv is installed.
set -eu

extra=$1
cd "$(dirname "$0")/.."
venv=.venv

say() { printf '%s\n' "$*" >&2; }

as_root_on_debian() {
    [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null
}

new_enough() {
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

makes_venvs() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

# Prints the first Python that can do it all; 1 = none is new enough, 2 = one is,
# but it cannot make virtual environments.
find_python() {
    result=1
    for name in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
        command -v "$name" >/dev/null || continue
        new_enough "$name" || continue
        if makes_venvs "$name"; then
            command -v "$name"
            return 0
        fi
        result=2
    done
    return $result
}

install_venv_module() {
    say "Installing python3-venv ..."
    export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
    apt-get update -qq && apt-get install -y -qq python3 python3-venv >/dev/null
}

choose_python() {
    if python=$(find_python); then return; fi
    if as_root_on_debian && install_venv_module && python=$(find_python); then
        return
    fi
    if find_python >/dev/null || [ $? = 2 ]; then
        say "Python has no venv module: run 'apt-get install -y python3-venv' as root."
    else
        say "Python 3.11 or later is needed:" \
            "run 'apt-get install -y python3 python3-venv' as root (Debian 12 or later)."
    fi
    exit 1
}

# Dead after the checkout was moved (scripts name their interpreter by its full path)
# or after that interpreter was removed or replaced.
environment_works() {
    grep -qF "$(pwd -P)/$venv/bin/" "$venv/bin/pip" 2>/dev/null &&
        "$venv/bin/python" -c 'import pip' 2>/dev/null && new_enough "$venv/bin/python"
}

if ! environment_works; then
    choose_python
    say "Making $venv with $python ..."
    "$python" -m venv --clear "$venv"
fi

say "Installing pysmcr[$extra] into $venv ..."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".[$extra]"
