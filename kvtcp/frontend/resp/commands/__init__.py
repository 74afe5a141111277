"""The commands of Redis, by what they are about."""
