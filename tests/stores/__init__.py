"""A real object store on this machine, and a proxy that makes it fail."""
