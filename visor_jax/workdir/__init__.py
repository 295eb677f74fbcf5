"""What a run leaves on disk, and what watches over the process that writes it."""
