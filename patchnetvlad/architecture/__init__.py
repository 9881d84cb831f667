"""The house itself: the README's table of modules held against the imports of the code, and drawn."""
