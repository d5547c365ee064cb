"""One side effect per module: clock, processes, journal, sockets, shared memory."""
