# Runs on every worker: starts the run as a systemd unit, unless it is running.
set -eu
unit={{ unit }}
case $(systemctl show --property=SubState --value "$unit") in
  running | start | start-pre | stop-sigterm | auto-restart) echo "$(hostname): $unit is running"; exit 0 ;;
esac
cd "visor/{{ launch.name }}"
cat >run_process <<'VISOR_END'
{{ run_script }}VISOR_END
{% if launch.in_bucket %}
log=$PWD/run.log
{% else %}
log={{ launch.workdir }}/logs/$(hostname).log
{% endif %}
mkdir -p "$(dirname -- "$log")"
# A unit that ended keeps its name until it is stopped.
sudo systemctl stop "$unit" "$unit-log.timer" 2>/dev/null || true
sudo systemctl reset-failed "$unit" "$unit-log.service" 2>/dev/null || true
as_me="--uid=$(id -u) --gid=$(id -g) --setenv=HOME=$HOME --setenv=PATH=$PATH"
# shellcheck disable=SC2086  # several words
sudo systemd-run --quiet --unit="$unit" $as_me --remain-after-exit --description="visor run {{ launch.name }}" \
  --property=KillMode=mixed --property=TimeoutStopSec={{ launch.grace_seconds }} \
  --property=SuccessExitStatus=143 --property=Restart=no --property="RestartForceExitStatus=134 SIGABRT" \
  --property=RestartSec=10 --property=StartLimitIntervalSec=30d --property=StartLimitBurst={{ launch.max_restarts + 1 }} \
  --property=LimitNOFILE=1048576 --property=LimitMEMLOCK=infinity \
  --property=StandardOutput="append:$log" --property=StandardError="append:$log" \
  /bin/bash "$PWD/run_process"
{% if launch.in_bucket %}
# shellcheck disable=SC2086
sudo systemd-run --quiet --unit="$unit-log" $as_me --on-active=60 --on-unit-active=60 \
  "$(command -v gcloud)" storage cp --quiet "$log" "{{ launch.workdir }}/logs/$(hostname).log"
{% endif %}
echo "$(hostname): $unit started"
