#!/usr/bin/env bash
# GCP: gcloud compute instances create … --provisioning-model=SPOT --instance-termination-action=STOP \
#        --metadata-from-file=startup-script=deploy/spot/gcp-startup.sh
# It runs at every boot. The image has everstep in /opt/everstep (a virtual environment), your script in /srv/train, and this
# repository's deploy/ in /usr/local/share/everstep. The disk everstep-job is attached with that device name and outlives the machine.
set -euo pipefail

device=${EVERSTEP_DEVICE:-/dev/disk/by-id/google-everstep-job}
if [ -e "$device" ]; then
    mkdir -p /mnt/job
    blkid "$device" >/dev/null || mkfs.ext4 -q "$device"
    mountpoint -q /mnt/job || mount "$device" /mnt/job
fi
export EVERSTEP_DIR=${EVERSTEP_DIR:-/mnt/job/train}
export EVERSTEP_COMMAND=${EVERSTEP_COMMAND:-torchrun --nproc-per-node=gpu train.py}
export EVERSTEP_UNIT=${EVERSTEP_UNIT:-/usr/local/share/everstep/systemd/everstep.service}
exec "${EVERSTEP_INSTALL:-/usr/local/share/everstep/spot/install.sh}"
