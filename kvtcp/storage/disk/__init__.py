"""One data directory: log, snapshots, manifest, and how they are read back."""
