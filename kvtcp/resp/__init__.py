"""The RESP face: clients of Redis, telnet and `nc` at the coordinator's port."""
