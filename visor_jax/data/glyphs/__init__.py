"""The generated data set: pictures of glyphs, and questions whose answers are known."""
