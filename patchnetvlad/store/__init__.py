"""Descriptors on disk and in memory: written so that a run may be killed, read as matching asks for them."""
