"""What users need to test against the real servers."""
