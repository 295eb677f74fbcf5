#!/bin/bash

# end the pods of first and wait for them
kubectl --context=c1 delete jobset first --ignore-not-found --cascade=foreground --wait --timeout=360s

# delete the configuration of first
kubectl --context=c1 delete configmap first-config --ignore-not-found

# on stderr: visor (dry run): first: deleted; workdir, secrets and node pools stay
