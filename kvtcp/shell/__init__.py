"""The shell: command table, parser, output, interactive front."""
