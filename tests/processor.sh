#!/usr/bin/env bash
# Runs a command as on another processor: tests/processor.sh plain|avx512 COMMAND...
# The flags in /proc/cpuinfo are what `precision=auto` reads; they are replaced for this command alone,
# in a mount namespace of its own. Needs root. What the processor really computes with stays.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: tests/processor.sh plain|avx512 COMMAND..." >&2; exit 2; }
case $1 in
    plain) edit='s/ (avx512|amx)[a-z0-9_]*//g' ;;
    avx512) edit='/^flags/ s/$/ avx512f avx512bw/' ;;
    *) echo "tests/processor.sh: $1 is neither plain nor avx512" >&2; exit 2 ;;
esac
shift
info=$(mktemp)
trap 'rm -f "$info"' EXIT
sed -E "$edit" /proc/cpuinfo >"$info"
unshare --mount bash -c 'mount --bind "$1" /proc/cpuinfo; shift; exec "$@"' - "$info" "$@"
