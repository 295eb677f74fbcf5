#!/bin/bash

# look for first (assumed here: failed)
kubectl --context=c1 get jobset first --ignore-not-found --output=json

# look for the secret hf-token, without reading it
kubectl --context=c1 get secret hf-token --output=name

# end the pods of first and wait for them
kubectl --context=c1 delete jobset first --ignore-not-found --cascade=foreground --wait --timeout=360s

mkdir -p visor-launch/first
cat >visor-launch/first/manifest.yaml <<'VISOR_END'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: first
  labels:
    kueue.x-k8s.io/queue-name: q1
    app.kubernetes.io/name: visor-jax
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    visor-jax/launch: 574f45eba8cf7408
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
            annotations:
              gke-gcsfuse/volumes: 'true'
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            shareProcessNamespace: true
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x4
              topology.kubernetes.io/zone: us-west4-a
            tolerations:
            - key: google.com/tpu
              operator: Exists
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
                value: --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
              - name: VISOR_COMPILE_CACHE
                value: gs://runs-1/compile_cache
              - name: HF_TOKEN
                valueFrom:
                  secretKeyRef:
                    name: hf-token
                    key: HF_TOKEN
              resources:
                limits:
                  google.com/tpu: 4
              securityContext:
                allowPrivilegeEscalation: false
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
              - name: bucket-0
                mountPath: /gcs/data-1
                readOnly: true
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
            - name: bucket-0
              csi:
                driver: gcsfuse.csi.storage.gke.io
                readOnly: true
                volumeAttributes:
                  bucketName: data-1
                  mountOptions: implicit-dirs
VISOR_END

# create the pods of first
kubectl --context=c1 apply --filename=visor-launch/first/manifest.yaml

# on stderr: visor (dry run): first: submitted; 'visor launch status' says when it runs
