#!/usr/bin/env bash
# Make a fresh machine carry on with a training: user, everstep, settings, the systemd unit, start. Safe to run at every boot.
# Run by cloud-init (AWS, Azure) and by the start-up script of GCP; docs/spot.md says with what.
#
#   EVERSTEP_COMMAND   what comes behind `everstep run`, for example: torchrun --nproc-per-node=8 train.py
#   EVERSTEP_DIR       the job directory, on a disk that outlives the machine, or with
#   EVERSTEP_CHECKPOINTS  a bucket: s3://…, gs://…, az://…
#   EVERSTEP_PACKAGE   what pip installs, a wheel or a directory, where the image has no everstep in /opt/everstep
#   EVERSTEP_UNIT      the unit file (default: everstep.service beside this script)
#   EVERSTEP_ROOT      install below this directory and start nothing (for tests and images)
set -euo pipefail

: "${EVERSTEP_COMMAND:?what is to be run, for example: torchrun --nproc-per-node=8 train.py}"
: "${EVERSTEP_DIR:?the job directory, on a disk that outlives the machine}"
root=${EVERSTEP_ROOT:-}
unit=${EVERSTEP_UNIT:-$(dirname "${BASH_SOURCE[0]}")/everstep.service}

# a system user: systemd-logind would remove other users' files in /dev/shm when they log out
if [ -z "$root" ] && ! id everstep >/dev/null 2>&1; then
    useradd --system --create-home --home-dir /srv/train --shell /usr/sbin/nologin everstep
fi
if [ ! -x "$root/opt/everstep/bin/everstep" ]; then
    : "${EVERSTEP_PACKAGE:?a wheel or a directory of everstep: there is none in /opt/everstep}"
    python3 -m venv "$root/opt/everstep"
    "$root/opt/everstep/bin/python" -m pip install --quiet "$EVERSTEP_PACKAGE"
fi

mkdir -p "$root/etc/everstep" "$root/etc/systemd/system" "$EVERSTEP_DIR"
printf 'EVERSTEP_COMMAND=%s\nPATH=/opt/everstep/bin:/usr/local/bin:/usr/bin:/bin\n' "$EVERSTEP_COMMAND" >"$root/etc/everstep/job.env"
{
    printf 'dir: "%s"\nnotices: auto\ngrace: 90s\n' "$EVERSTEP_DIR"
    if [ -n "${EVERSTEP_CHECKPOINTS:-}" ]; then
        printf 'checkpoints: "%s"\n' "$EVERSTEP_CHECKPOINTS"
    fi
} >"$root/etc/everstep/job.yaml"
install -m 644 "$unit" "$root/etc/systemd/system/everstep.service"

if [ -z "$root" ]; then
    chown everstep: "$EVERSTEP_DIR"
    systemctl daemon-reload
    systemctl enable --now everstep.service
fi
