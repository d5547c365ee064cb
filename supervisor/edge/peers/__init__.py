"""Snapshots from one node's RAM to another's: who serves them, and how one is fetched.

One connection, one request, in the frames of ``store.wire``: both ends know the job's secret, or nothing is said.

    listing    which files the snapshot of (attempt, step) has, their sizes, and the text of its ``slot.json``
    file       one of them: its size is answered; when the client has said "go", the bytes follow outside the frames;
               then, in a frame again, their BLAKE3 digest, or that the snapshot has gone

What arrives under its final name is what the snapshot held, byte for byte, or nothing arrives:

- *Of the right snapshot.* A slot may be written anew while it is read, but its ``slot.json`` is removed before (``slots``). The
  server looks at it again after it has read the last byte: if it is still the very text that the client was listed, all bytes
  were the snapshot's. A text is of one snapshot only: it bears the time at which that was complete.
- *Unchanged on the way.* The digest is of the bytes as they were handed to the socket, and the frame that says it authenticates.
- *Whole.* The client writes to a name nobody looks at, and renames at the end.

Bytes go through one buffer of a megabyte on either side, in a thread of the transfer's own: read, hashed while they are in the
processor's cache, sent; received, hashed, written. ``benchmarks/fetching.py`` on two cores with both ends on them: 1.35 GB/s over
loopback, where a bare ``sendfile`` does 1.66; 0.35 seconds of one core for each GB at either end, of which hashing is 0.1 to 0.15
(BLAKE3; BLAKE2b would be 0.7). ``sendfile`` would save a copy that the hash needs anyway, and pages that are still in the socket
could change after they were hashed. Receiving into a mapping was half as fast. Fresh pages of tmpfs double the receiver's cost:
``warm`` names a file whose pages can be had.
"""
