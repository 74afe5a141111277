"""What a node keeps: the ordered index, the table of one shard, backups."""
