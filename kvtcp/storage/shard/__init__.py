"""One shard in memory."""
