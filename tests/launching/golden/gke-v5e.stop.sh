#!/bin/bash

# end the pods of first and wait for them
kubectl --context=c1 delete jobset first --ignore-not-found --cascade=foreground --wait --timeout=360s

# on stderr: visor (dry run): first: SIGTERM; waiting at most 300 s for the processes to save
# on stderr: visor (dry run): first: stopped; node pools that do not shrink still cost money
