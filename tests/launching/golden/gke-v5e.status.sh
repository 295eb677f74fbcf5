#!/bin/bash

# look for first (assumed here: running)
kubectl --context=c1 get jobset first --ignore-not-found --output=json

# ask for its pods
kubectl --context=c1 get pods --selector=jobset.sigs.k8s.io/jobset-name=first --output=json
