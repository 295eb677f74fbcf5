#!/bin/bash

# look at the queued resource (assumed here: ACTIVE)
gcloud compute tpus queued-resources describe first --format=json --zone=us-west4-a --project=my-project --quiet

# show the log of worker 0
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=0 --worker=0 '--command=# Runs on one worker: the end of its log.
log=$PWD/visor/first/run.log
exec tail -n 200 "$log"
'
