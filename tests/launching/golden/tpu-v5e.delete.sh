#!/bin/bash

# delete the queued resource
gcloud compute tpus queued-resources delete first --force --zone=us-west4-a --project=my-project --quiet

# on stderr: visor (dry run): first: deleted
