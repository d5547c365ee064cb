"""Tests of what a run tells others: hooks and metrics."""
