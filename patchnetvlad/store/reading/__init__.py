"""Reading what matching asks for: from a folder, from memory, or described when asked for."""
