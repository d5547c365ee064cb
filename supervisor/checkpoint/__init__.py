"""The checkpoint format on disk: manifest, commit, verification, catalogue, retention."""
