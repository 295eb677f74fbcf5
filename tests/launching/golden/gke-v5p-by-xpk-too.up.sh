#!/bin/bash

# look for first (assumed here: absent)
kubectl --context=c1 get jobset first --ignore-not-found --output=json

mkdir -p visor-launch/first
cat >visor-launch/first/manifest.yaml <<'VISOR_END'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: first
  labels:
    app.kubernetes.io/name: visor-jax
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    visor-jax/launch: 5cbbdd433f5546e0
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: 50
    rules:
    - name: fails
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: 4
        completions: 4
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: Count
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
          - action: FailJob
            onExitCodes:
              containerName: visor
              operator: NotIn
              values:
              - 134
              - 143
        template:
          metadata:
            labels:
              app.kubernetes.io/name: visor-jax
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            shareProcessNamespace: true
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5p-slice
              cloud.google.com/gke-tpu-topology: 2x2x4
              topology.kubernetes.io/zone: us-east5-a
              cloud.google.com/gke-spot: 'true'
            tolerations:
            - key: google.com/tpu
              operator: Exists
              effect: NoSchedule
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
            containers:
            - name: visor
              image: us-docker.pkg.dev/my-project/visor/visor:1
              command:
              - bash
              - -c
              args:
              - exec visor run --config=llava_ov_0p5b --workdir=gs://runs-1/first
              env:
              - name: JAX_PLATFORMS
                value: tpu,cpu
              - name: LIBTPU_INIT_ARGS
                value: --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true --xla_sc_disable_megacore_partitioning=true --xla_tpu_use_tc_device_shape_on_sc=true --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
              - name: VISOR_COMPILE_CACHE
                value: gs://runs-1/compile_cache
              resources:
                limits:
                  google.com/tpu: 4
              securityContext:
                allowPrivilegeEscalation: false
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
VISOR_END

# create the pods of first
kubectl --context=c1 apply --filename=visor-launch/first/manifest.yaml

# on stderr: visor (dry run): for a cluster without such nodes: gcloud container node-pools create first-0 --cluster=c1 --node-locations=us-east5-a --project=my-project --machine-type=ct5p-hightpu-4t --num-nodes=4 --tpu-topology=2x2x4 --spot
# on stderr: visor (dry run): the same run by xpk: xpk workload create --cluster=c1 --workload=first --tpu-type=v5p-2x2x4 --num-slices=1 --zone=us-east5-a --project=my-project --docker-name=visor --docker-image=us-docker.pkg.dev/my-project/visor/visor:1 --max-restarts=50 --termination-grace-period-seconds=300 --restart-on-exit-codes=134,143 --spot --env=JAX_PLATFORMS=tpu,cpu '--env=LIBTPU_INIT_ARGS=--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true --xla_sc_disable_megacore_partitioning=true --xla_tpu_use_tc_device_shape_on_sc=true --xla_tpu_enable_sparse_core_collective_offload_all_gather=true' --env=VISOR_COMPILE_CACHE=gs://runs-1/compile_cache '--command=exec visor run --config=llava_ov_0p5b --workdir=gs://runs-1/first'
# on stderr: visor (dry run): first: submitted; 'visor launch status' says when it runs
