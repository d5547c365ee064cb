"""everstep's tests: ``make test``."""
