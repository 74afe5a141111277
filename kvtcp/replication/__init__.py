"""The pure cores of replication: placement, windows, sequencing, replicas."""
