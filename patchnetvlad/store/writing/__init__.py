"""Writing a feature folder, so that a run may be killed and goes on."""
