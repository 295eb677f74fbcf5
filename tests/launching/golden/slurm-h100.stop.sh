#!/bin/bash

# look for jobs of this name (assumed here: 1|RUNNING|None)
squeue --me --name=first --noheader '--format=%i|%T|%r'

# let the job not return
scontrol update JobId=1 Requeue=0

# send SIGTERM to the tasks
scancel --signal=TERM 1

# look for jobs of this name (assumed here: none)
squeue --me --name=first --noheader '--format=%i|%T|%r'

# on stderr: visor (dry run): first: stopped
