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
cat >visor-launch/first/config.json <<'VISOR_END'
{"resolved": "configuration"}
VISOR_END

mkdir -p visor-launch/first
cat >visor-launch/first/task.yaml <<'VISOR_END'
name: first
resources:
  infra: gcp/us-east5/us-east5-b
  accelerators: tpu-v6e-8
  accelerator_args:
    runtime_version: v2-alpha-tpuv6e
  use_spot: true
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 143
    - 134
num_nodes: 1
envs:
  JAX_PLATFORMS: tpu,cpu
  LIBTPU_INIT_ARGS: --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_use_minor_sharding_for_major_trivial_input=true --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 --xla_tpu_assign_all_reduce_scatter_layout=true
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
  exec visor run --config=config.json --workdir=gs://runs-1/first
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
