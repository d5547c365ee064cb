"""The clouds' metadata services, emulated, and what everstep makes of them."""
