"""What a stage minimizes, one file per objective."""
