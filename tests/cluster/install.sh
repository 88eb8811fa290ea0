#!/bin/sh
# Installs what tests/cluster needs: SLURM, munge, iproute2, util-linux; on Debian and Ubuntu, as
# root. Nothing is started: no service of a package that this installs runs afterwards.
set -eu

PATH="/usr/sbin:/sbin:$PATH"
commands="slurmctld slurmd sbatch srun scontrol munged ip tc unshare nsenter"
absent=""
for name in $commands; do
    command -v "$name" >/dev/null || absent="$absent $name"
done
if [ -z "$absent" ]; then
    echo "SLURM $(slurmd -V | cut -d' ' -f2) is installed"
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing:$absent; installing them needs root on Debian or Ubuntu" >&2
    exit 1
fi

# dpkg asks this file whether it may start services; 101 means no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -q && apt-get install -qy --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 util-linux; } >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
rm -f "$log"
echo "SLURM $(slurmd -V | cut -d' ' -f2) installed"
