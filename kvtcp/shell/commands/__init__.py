"""The commands of the shell, by their subjects."""
