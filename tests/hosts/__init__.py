"""Hosts on a network, which the tests set up on this machine."""
