# Runs on every worker: SIGTERM to the run, which saves; waits until it has ended.
set -eu
unit={{ unit }}
running() {
  case $(systemctl show --property=SubState --value "$unit") in
    running | start | stop-sigterm) return 0 ;;
    *) return 1 ;;
  esac
}
if [ "$(systemctl show --property=SubState --value "$unit")" = auto-restart ]; then sudo systemctl stop "$unit"; fi
if ! running; then echo "$(hostname): $unit is not running"; exit 0; fi
sudo systemctl kill --kill-who=main --signal=SIGTERM "$unit"
for _ in $(seq {{ launch.grace_seconds }}); do
  if ! running; then
    echo "$(hostname): $unit ended with $(systemctl show --property=ExecMainStatus --value "$unit")"
    exit 0
  fi
  sleep 1
done
echo "$(hostname): $unit has not saved in {{ launch.grace_seconds }} seconds and still runs" >&2
exit 1
