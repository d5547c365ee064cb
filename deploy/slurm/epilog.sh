#!/bin/bash
# For slurm.conf: Epilog=/…/epilog.sh (run by slurmd as root on each node when a job ends there).
# Removes what a job of everstep has left in the node's memory: only one that was killed leaves anything.
# Each runtime directory names its job, so other jobs of the same user keep theirs.
shopt -s nullglob
for place in /dev/shm "${TMPDIR:-/tmp}"; do
    for runtime in "$place/everstep-$SLURM_JOB_UID"/*/; do
        [ "$(cat "$runtime/engine" 2>/dev/null)" = "slurm $SLURM_JOB_ID" ] || continue
        for slot in "$runtime"slots/*; do # one for which memory had no room lies in the temporary directory
            target=$(readlink "$slot") || continue
            case $target in */"everstep-$SLURM_JOB_UID-slot@"*) rm -rf -- "$target" ;; esac
        done
        rm -rf -- "$runtime"
    done
done
exit 0
