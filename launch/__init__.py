"""everstep's command line, and what starts inside a worker before the user's script does."""
