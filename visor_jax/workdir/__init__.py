"""A run's files on disk, and the supervision of the process that writes them."""
