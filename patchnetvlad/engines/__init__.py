"""Runs on several processes and machines: blocks of pictures and of queries, handed out by Ray."""
