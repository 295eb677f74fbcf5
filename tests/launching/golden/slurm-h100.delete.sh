#!/bin/bash

# look for jobs of this name (assumed here: 1|RUNNING|None)
squeue --me --name=first --noheader '--format=%i|%T|%r'

# cancel the job
scancel 1

# on stderr: visor (dry run): first: deleted; workdir and logs stay
