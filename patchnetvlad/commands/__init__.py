"""The command lines: one module a topic; scripts call them, nothing else does."""
