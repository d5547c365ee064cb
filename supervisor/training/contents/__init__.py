"""What is in a checkpoint, for people: looked at, compared, exported. Runs in the command line's process, not in workers."""
