"""The command lines, one module a topic: what the scripts call."""
