"""What the supervisors of several nodes know in common: a small table with leases. ``protocol`` says what it promises."""
