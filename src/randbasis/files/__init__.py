"""Where a file is, and one way to write it."""
