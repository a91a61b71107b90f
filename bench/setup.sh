#!/bin/sh
# What the benchmarks need beside Python: wrk. Installed where apt-get is permitted.
set -eu
command -v wrk >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq wrk >/dev/null
else
    echo "wrk is missing: the requests-per-second figure is skipped by name (Debian: apt-get install wrk)" >&2
fi
