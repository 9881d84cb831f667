"""What has been read or described, kept in memory and on disk up to a limit."""
