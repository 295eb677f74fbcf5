#!/bin/bash

# look for the secret hf-token, without reading it
kubectl --context=c1 get secret hf-token --output=name

# look for first (assumed here: absent)
kubectl --context=c1 get jobset first --ignore-not-found --output=json

mkdir -p visor-launch/first
cat >visor-launch/first/manifest.yaml <<'VISOR_END'
apiVersion: v1
kind: ConfigMap
metadata:
  name: first-config
  labels:
    app.kubernetes.io/name: visor-jax
data:
  config.json: '{"resolved": "configuration"}

    '
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: first
  labels:
    kueue.x-k8s.io/queue-name: q1
    app.kubernetes.io/name: visor-jax
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    visor-jax/launch: 5df33af9e92ab779
    provreq.kueue.x-k8s.io/maxRunDurationSeconds: '86400'
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
              cloud.google.com/gke-tpu-accelerator: tpu7x
              cloud.google.com/gke-tpu-topology: 2x2x2
              topology.kubernetes.io/zone: us-central1-c
              cloud.google.com/gke-flex-start: 'true'
            tolerations:
            - key: google.com/tpu
              operator: Exists
              effect: NoSchedule
            - key: cloud.google.com/gke-flex-start
              operator: Equal
              value: 'true'
              effect: NoSchedule
            - key: cloud.google.com/gke-queued
              operator: Exists
              effect: NoSchedule
            containers:
            - name: visor
              image: us-docker.pkg.dev/my-project/visor/visor:1
              command:
              - bash
              - -c
              args:
              - exec visor run --config=/etc/visor/config.json --workdir=gs://runs-1/first
              env:
              - name: JAX_PLATFORMS
                value: tpu,cpu
              - name: LIBTPU_INIT_ARGS
                value: --xla_tpu_scoped_vmem_limit_kib=61440 --xla_tpu_bf16_emission_mode=NATIVE_EMISSION --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
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
              - name: config
                mountPath: /etc/visor
                readOnly: true
              - name: bucket-0
                mountPath: /gcs/data-1
                readOnly: true
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
            - name: config
              configMap:
                name: first-config
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

# on stderr: visor (dry run): for a cluster without such nodes: gcloud compute resource-policies create workload-policy tpu7x-2x2x2 --type=HIGH_THROUGHPUT --accelerator-topology=2x2x2 --region=us-central1 --project=my-project
# on stderr: visor (dry run): for a cluster without such nodes: gcloud container node-pools create first-0 --cluster=c1 --node-locations=us-central1-c --project=my-project --machine-type=tpu7x-standard-4t --num-nodes=0 --placement-policy=tpu7x-2x2x2 --flex-start --enable-autoscaling --max-nodes=2 --location-policy=ANY --reservation-affinity=none --no-enable-autorepair --enable-queued-provisioning
# on stderr: visor (dry run): xpk has no option for --secret, --bucket, --config=configs/forkme.py, --queue=q1; use the manifest
# on stderr: visor (dry run): first: submitted; 'visor launch status' says when it runs
