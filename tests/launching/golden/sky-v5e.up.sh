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
  infra: gcp/us-west4/us-west4-a
  accelerators: tpu-v5litepod-16
  accelerator_args:
    runtime_version: v2-alpha-tpuv5-lite
  use_spot: false
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 143
    - 134
num_nodes: 1
envs:
  JAX_PLATFORMS: tpu,cpu
  LIBTPU_INIT_ARGS: --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
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
  uv pip install --quiet --python "$HOME/visor/bin/python" './visor_jax-VERSION-py3-none-any.whl[tpu,gcs]' PINS
run: |
  set -eu
  export PATH="$HOME/visor/bin:$PATH"
  exec visor run --config=llava_ov_0p5b --workdir=gs://runs-1/first
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
