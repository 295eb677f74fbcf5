"""The paper's tables and figures as commands: an entry each, with its numbers beside ours (`run.py`)."""
