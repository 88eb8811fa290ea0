#!/bin/sh
# Installs the browser that tests of HTML reports drive; on Debian as root. (Ubuntu's chromium is a
# snap: there, install google-chrome, or name a browser in $FORESCALE_BROWSER.)
set -eu

for name in "${FORESCALE_BROWSER:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    if [ -n "$name" ] && command -v "$name" >/dev/null; then
        echo "$name is installed"
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no browser is installed; installing chromium needs root on Debian" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -q && apt-get install -qy --no-install-recommends \
    chromium fonts-dejavu-core; } >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
rm -f "$log"
echo "chromium installed"
