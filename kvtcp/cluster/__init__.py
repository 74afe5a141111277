"""What a cluster is (map, placement, changes), and where that is kept (config stores)."""
