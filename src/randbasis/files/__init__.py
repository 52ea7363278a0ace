"""Where a file is, and one way to write it: whole or absent, by one rule of what may be replaced."""
