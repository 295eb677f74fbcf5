"""The generated data set: pictures of glyphs, with questions and their answers."""
