#!/bin/bash

# show the logs of first
kubectl --context=c1 logs --selector=jobset.sigs.k8s.io/jobset-name=first --container=visor --prefix --tail=200 --max-log-requests=256 --ignore-errors
