"""What both server processes need of the machine."""
