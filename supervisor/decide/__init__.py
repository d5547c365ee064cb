"""The decision core: pure functions from facts (and a given time) to decisions. No I/O."""
