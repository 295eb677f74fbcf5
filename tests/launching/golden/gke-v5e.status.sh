#!/bin/bash

# look for first
kubectl --context=c1 get jobset first --ignore-not-found --output=json
