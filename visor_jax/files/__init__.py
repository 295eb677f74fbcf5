"""Files as the package reads and writes them: whole or not at all, of bounded size, of the expected shape."""
