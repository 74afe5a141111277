"""Clients of the cluster: asynchronous and synchronous."""
