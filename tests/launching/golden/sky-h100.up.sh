#!/bin/bash

# look for first
sky jobs queue --refresh --all --output json

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
cat >visor-launch/first/.skyignore <<'VISOR_END'
build
setuptools.cfg
*.egg-info
VISOR_END

mkdir -p visor-launch/first
cat >visor-launch/first/task.yaml <<'VISOR_END'
name: first
resources:
  infra: gcp
  accelerators: H100:8
  use_spot: false
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 143
    - 134
num_nodes: 2
envs:
  JAX_PLATFORMS: cuda,cpu
  XLA_FLAGS: --xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= --xla_gpu_all_gather_combine_threshold_bytes=1073741824 --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824 --xla_gpu_all_reduce_combine_threshold_bytes=134217728 --xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_enable_while_loop_double_buffering=true
  CUDA_DEVICE_MAX_CONNECTIONS: '1'
  JAX_OPTIMIZATION_LEVEL: O1
  VISOR_COMPILE_CACHE: gs://runs-1/compile_cache
secrets:
  HF_TOKEN: null
workdir: visor-launch/first
file_mounts:
  /gcs/data-1:
    source: gs://data-1
    mode: MOUNT
setup: |
  set -eu
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv==0.13.9
  uv venv --allow-existing --quiet --python 3.12 "$HOME/visor"
  uv pip install --quiet --python "$HOME/visor/bin/python" './visor_jax-VERSION-py3-none-any.whl[cuda,gcs]' PINS
run: |
  set -eu
  export PATH="$HOME/visor/bin:$PATH"
  export JAX_COORDINATOR_ADDRESS="${SKYPILOT_NODE_IPS%%[[:space:]]*}:8476"
  export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
  exec visor run --config=llava_ov_0p5b --workdir=gs://runs-1/first --config.train.steps=9
config:
  hooks:
  - run: |
      pkill -TERM -f 'bin/[v]isor run' || exit 0
      while pgrep -f 'bin/[v]isor run' >/dev/null; do sleep 1; done
    timeout: 300
VISOR_END

# start the managed job first
sky jobs launch --name first --secret HF_TOKEN --yes --detach-run visor-launch/first/task.yaml

# on stderr: visor (dry run): --project=my-project: SkyPilot takes the project that 'gcloud config get project' prints
# on stderr: visor (dry run): first: submitted; 'visor launch status' says when it runs
