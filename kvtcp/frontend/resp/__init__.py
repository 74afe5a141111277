"""Clients of Redis."""
