"""Dense plans whose later layers read fewer visual tokens: `api.run_dropping`."""
