"""Sources of conversations, one file each."""
