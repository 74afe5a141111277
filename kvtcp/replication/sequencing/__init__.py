"""The path of requests: numbers, batches, commits, answers."""
