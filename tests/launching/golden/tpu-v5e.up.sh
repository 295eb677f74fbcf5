#!/bin/bash

# look at the queued resource (assumed here: NOT_FOUND)
gcloud compute tpus queued-resources describe first --format=json --zone=us-west4-a --project=my-project --quiet

# create the queued resource
gcloud compute tpus queued-resources create first --node-id=first --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --valid-until-duration=24h --scopes=https://www.googleapis.com/auth/cloud-platform --labels=app=visor --zone=us-west4-a --project=my-project --quiet

# look at the queued resource (assumed here: ACTIVE)
gcloud compute tpus queued-resources describe first --format=json --zone=us-west4-a --project=my-project --quiet

# make the run's folder on every worker
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=all --worker=all '--command=# Runs on every worker: makes the run'"'"'s folder, and says whether the run is running.
set -eu
mkdir -p "visor/first"
case $(systemctl show --property=SubState --value visor-first) in
  running | start | start-pre | stop-sigterm | auto-restart) echo "$(hostname): running" ;;
  *) echo "$(hostname): ready" ;;
esac
'

mkdir -p visor-launch/first
cat >visor-launch/first/setuptools.cfg <<'VISOR_END'
[build]
build_base = /here/visor-launch/first/build
[egg_info]
egg_base = /here/visor-launch/first
VISOR_END

# build the wheel
env DIST_EXTRA_CONFIG=/here/visor-launch/first/setuptools.cfg python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir=visor-launch/first /repository

mkdir -p visor-launch/first
cat >visor-launch/first/config.json <<'VISOR_END'
{"resolved": "configuration"}
VISOR_END

# copy the package and the configuration
gcloud compute tpus queued-resources scp visor-launch/first/visor_jax-VERSION-py3-none-any.whl visor-launch/first/config.json first:visor/first/ --zone=us-west4-a --project=my-project --quiet --node=all --worker=all

# install the package on every worker
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=all --worker=all '--command=# Runs on every worker: installs the package into visor/first/env, and mounts buckets. A running run keeps
# what it has.
set -eu
case $(systemctl show --property=SubState --value visor-first) in
  running | start | start-pre | stop-sigterm | auto-restart) exit 0 ;;
esac
# The TPU'"'"'s runtime starts faster with huge pages.
if [ -e /sys/kernel/mm/transparent_hugepage/enabled ]; then
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
fi
cd "visor/first"
python3 -m pip install --quiet --user uv
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 env
"$HOME/.local/bin/uv" pip install --quiet --python env/bin/python --reinstall-package visor-jax \
  PINS "visor-jax[tpu,gcs] @ file://$PWD/visor_jax-VERSION-py3-none-any.whl"
if ! command -v gcsfuse >/dev/null; then
  release=$(lsb_release -c -s)
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -q update
  sudo apt-get -q install --yes gcsfuse
fi
sudo mkdir -p "/gcs/data-1"
mountpoint -q "/gcs/data-1" || sudo gcsfuse -o ro,allow_other --implicit-dirs data-1 "/gcs/data-1"
'

# start the run on every worker
gcloud compute tpus queued-resources ssh first --zone=us-west4-a --project=my-project --quiet --node=all --worker=all '--command=# Runs on every worker: starts the run as a systemd unit, unless it is running.
set -eu
unit=visor-first
case $(systemctl show --property=SubState --value "$unit") in
  running | start | start-pre | stop-sigterm | auto-restart) echo "$(hostname): $unit is running"; exit 0 ;;
esac
cd "visor/first"
cat >run_process <<'"'"'VISOR_END'"'"'
#!/bin/bash
# One process of the run first; systemd runs it on every worker.
set -eu
cd "$(dirname -- "$0")"
export JAX_PLATFORMS=tpu,cpu
export LIBTPU_INIT_ARGS='"'"'--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000'"'"'
export VISOR_COMPILE_CACHE=gs://runs-1/compile_cache
HF_TOKEN=$(gcloud secrets versions access latest --secret=HF_TOKEN --project=my-project)
export HF_TOKEN
exec env/bin/visor run --config=config.json --workdir=gs://runs-1/first
VISOR_END
log=$PWD/run.log
mkdir -p "$(dirname -- "$log")"
# A unit that ended keeps its name until it is stopped.
sudo systemctl stop "$unit" "$unit-log.timer" 2>/dev/null || true
sudo systemctl reset-failed "$unit" "$unit-log.service" 2>/dev/null || true
as_me="--uid=$(id -u) --gid=$(id -g) --setenv=HOME=$HOME --setenv=PATH=$PATH"
# shellcheck disable=SC2086  # several words
sudo systemd-run --quiet --unit="$unit" $as_me --remain-after-exit --description="visor run first" \
  --property=KillMode=mixed --property=TimeoutStopSec=300 \
  --property=SuccessExitStatus=143 --property=Restart=no --property="RestartForceExitStatus=134 SIGABRT" \
  --property=RestartSec=10 --property=StartLimitIntervalSec=30d --property=StartLimitBurst=51 \
  --property=LimitNOFILE=1048576 --property=LimitMEMLOCK=infinity \
  --property=StandardOutput="append:$log" --property=StandardError="append:$log" \
  /bin/bash "$PWD/run_process"
# shellcheck disable=SC2086
sudo systemd-run --quiet --unit="$unit-log" $as_me --on-active=60 --on-unit-active=60 \
  "$(command -v gcloud)" storage cp --quiet "$log" "gs://runs-1/first/logs/$(hostname).log"
echo "$(hostname): $unit started"
'

# on stderr: visor (dry run): first: ACTIVE
# on stderr: visor (dry run): first: copying the package and the configuration to every worker
# on stderr: visor (dry run): first: installing on every worker, which takes minutes
