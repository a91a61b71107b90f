#!/bin/sh
# Installs the named Debian packages that aren't there, where that is permitted; elsewhere says which are missing.
# What needs them is then skipped by name.
missing=
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' && continue
    command -v "$package" >/dev/null 2>&1 && continue
    missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null && exit 0
fi
echo "missing:$missing (Debian: apt-get install$missing)" >&2
