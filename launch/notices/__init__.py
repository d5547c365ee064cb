"""Who may take this machine away, and how word of it comes: the clouds' metadata services. Signals need no watcher."""
