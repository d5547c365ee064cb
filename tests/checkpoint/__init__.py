"""The checkpoint format: damage, crashes, full disks, keys."""
