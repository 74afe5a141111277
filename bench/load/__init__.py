"""Load, and the clusters it is put on."""
