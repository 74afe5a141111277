"""The config store: one small value with compare-and-set, which owns who is a member of what."""
