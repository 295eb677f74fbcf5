#!/bin/bash

# look at the queued resource (assumed here: ACTIVE)
gcloud compute tpus queued-resources describe first --format=json --zone=us-west4-a --project=my-project --quiet

# stop the run on every worker
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=all --worker=all '--command=# Runs on every worker: SIGTERM to the run, which saves; waits until it has ended.
set -eu
unit=visor-first
running() {
  case $(systemctl show --property=SubState --value "$unit") in
    running | start | stop-sigterm) return 0 ;;
    *) return 1 ;;
  esac
}
if [ "$(systemctl show --property=SubState --value "$unit")" = auto-restart ]; then sudo systemctl stop "$unit"; fi
if ! running; then echo "$(hostname): $unit is not running"; exit 0; fi
sudo systemctl kill --kill-who=main --signal=SIGTERM "$unit"
for _ in $(seq 300); do
  if ! running; then
    echo "$(hostname): $unit ended with $(systemctl show --property=ExecMainStatus --value "$unit")"
    exit 0
  fi
  sleep 1
done
echo "$(hostname): $unit has not saved in 300 seconds and still runs" >&2
exit 1
'

# on stderr: visor (dry run): first: stopped; its machines still cost money until 'visor launch delete'
