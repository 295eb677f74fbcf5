# Runs on every worker: one line about the run.
properties=$(systemctl show --property=SubState,Result,ExecMainStatus,NRestarts {{ unit }} | tr '\n' ' ')
echo "$(hostname): $properties"
