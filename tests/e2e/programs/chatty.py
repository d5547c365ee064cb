"""Prints in every way a rank can print; rank 1 of attempt 0 is killed with half a line written."""

import os
import signal
import subprocess
import sys
import time

rank, attempt = os.environ["RANK"], os.environ["EVERSTEP_ATTEMPT"]
for n in range(200):
    sys.stdout.write(f"out {n} of rank {rank}")
    sys.stdout.write(" in two halves\n")
    print(f"err {n} of rank {rank}", file=sys.stderr)
os.write(1, f"straight to the descriptor, rank {rank}\n".encode())
subprocess.run(["echo", f"from a child of rank {rank}"], check=True)
if attempt == "0":
    if rank == "1":
        sys.stdout.write("last words, no newline")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
