"""Callbacks for trainers that own the loop. Each module needs its library, an extra of everstep, and nothing else imports it."""
