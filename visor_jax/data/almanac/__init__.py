"""The generated data set `almanac`: pages drawn from real tables, with questions and their answers."""
