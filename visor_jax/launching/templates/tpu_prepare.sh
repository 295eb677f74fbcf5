# Runs on every worker: makes the run's folder, and says whether the run is running.
set -eu
mkdir -p "visor/{{ launch.name }}"
case $(systemctl show --property=SubState --value {{ unit }}) in
  running | start | start-pre | stop-sigterm | auto-restart) echo "$(hostname): running" ;;
  *) echo "$(hostname): ready" ;;
esac
