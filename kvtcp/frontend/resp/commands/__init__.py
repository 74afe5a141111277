"""The commands of Redis, by their subjects."""
