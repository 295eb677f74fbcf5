#!/bin/bash

# look for the secret hf-token, without reading it
kubectl --context=c1 get secret hf-token --output=name

# look for first (assumed here: absent)
kubectl --context=c1 get jobset first --ignore-not-found --output=json

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
    visor-jax/launch: 7f7ecb5bbdb8edd8
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
        parallelism: 2
        completions: 2
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
              cloud.google.com/gke-accelerator: nvidia-h100-80gb
              topology.kubernetes.io/zone: us-central1-a
            tolerations:
            - key: nvidia.com/gpu
              operator: Exists
              effect: NoSchedule
            containers:
            - name: visor
              image: us-docker.pkg.dev/my-project/visor/visor:1
              command:
              - bash
              - -c
              args:
              - exec visor run --config=llava_ov_0p5b --workdir=gs://runs-1/first --config.train.steps=9
              env:
              - name: JAX_PLATFORMS
                value: cuda,cpu
              - name: XLA_FLAGS
                value: --xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= --xla_gpu_all_gather_combine_threshold_bytes=1073741824 --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824 --xla_gpu_all_reduce_combine_threshold_bytes=134217728 --xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_enable_while_loop_double_buffering=true
              - name: CUDA_DEVICE_MAX_CONNECTIONS
                value: '1'
              - name: JAX_OPTIMIZATION_LEVEL
                value: O1
              - name: VISOR_COMPILE_CACHE
                value: gs://runs-1/compile_cache
              - name: JAX_COORDINATOR_ADDRESS
                value: first-slice-0-0.first:8476
              - name: JAX_NUM_PROCESSES
                value: '2'
              - name: HF_TOKEN
                valueFrom:
                  secretKeyRef:
                    name: hf-token
                    key: HF_TOKEN
              resources:
                limits:
                  nvidia.com/gpu: 8
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
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
VISOR_END

# create the pods of first
kubectl --context=c1 apply --filename=visor-launch/first/manifest.yaml

# on stderr: visor (dry run): for a cluster without such nodes: gcloud container node-pools create first-0 --cluster=c1 --node-locations=us-central1-a --project=my-project --machine-type=a3-highgpu-8g --num-nodes=2 --accelerator=type=nvidia-h100-80gb,count=8,gpu-driver-version=default
# on stderr: visor (dry run): xpk has no option for --secret, --bucket, --topology=h100x8:2, --queue=q1; use the manifest
# on stderr: visor (dry run): first: submitted; 'visor launch status' says when it runs
