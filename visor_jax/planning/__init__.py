"""Plans a run before it is paid for: memory, FLOPs, collectives and time per step of every stage on a topology."""
