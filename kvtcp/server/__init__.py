"""The I/O shells: transports, node, coordinator, supervisor."""
