#!/bin/bash

# look at the queued resource (assumed here: ACTIVE)
gcloud compute tpus queued-resources describe first --format=json --zone=us-west4-a --project=my-project --quiet

# ask every worker
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=all --worker=all '--command=# Runs on every worker: one line about the run.
properties=$(systemctl show --property=SubState,Result,ExecMainStatus,NRestarts visor-first | tr '"'"'\n'"'"' '"'"' '"'"')
echo "$(hostname): $properties"
'
