#!/bin/bash

# look for jobs of this name (assumed here: none)
squeue --me --name=first --noheader '--format=%i|%T|%r'

mkdir -p visor-launch/first
cat >visor-launch/first/visor.sbatch <<'VISOR_END'
#!/bin/bash
# The run first on 2 nodes with 8 h100 GPUs each, one process per GPU.
#
# `visor launch --target=slurm` writes and submits this; by hand, from a shell where `visor` works:
#     mkdir -p /shared/first/logs && sbatch THIS_FILE
# Account, QOS, time limit, reservation and constraint are the site's: SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT,
# SBATCH_RESERVATION and SBATCH_CONSTRAINT, or options of sbatch, which have precedence over these lines:
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/first/logs/first.log
#SBATCH --partition=gpu
#
# The signal goes to the tasks, not to this shell: they save and end with 143. Statuses of a run: 0 complete; 143 stopped
# after saving; 134 aborted because another process was lost; 1 and 2 failed. When one task ends with another status than
# 0, Slurm sends SIGTERM to the others, which then end with 143 too. Therefore each task records its own status, and the
# job is put back into the queue only if no task failed.
# shellcheck disable=SC2016 # what is in single quotes is not for this shell to expand
set -u
logs=/shared/first/logs
max_restarts=50
restarts=${SLURM_RESTART_COUNT:-0}
ended=$logs/first.$SLURM_JOB_ID.$restarts.ended

say() { printf '%s visor.sbatch: %s\n' "$(date '+%F %T')" "$*"; }

# A signal to the whole job (scancel --full) reaches this shell and srun too. This shell goes on; srun kills the tasks at
# once. To let them save: scancel --signal=TERM, without --full.
trap : TERM

# --- environment: a variable that was set when the job was submitted has precedence ---
unset http_proxy https_proxy all_proxy grpc_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY # JAX's connections hang in a proxy
unset JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_IP JAX_NUM_PROCESSES JAX_PROCESS_ID # Slurm's variables form the run
default() {
  if [ -n "${!1+set}" ]; then
    say "$1=${!1} (as submitted)"
  else
    export "$1=$2"
  fi
}
default JAX_PLATFORMS cuda,cpu
default XLA_FLAGS '--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= --xla_gpu_all_gather_combine_threshold_bytes=1073741824 --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824 --xla_gpu_all_reduce_combine_threshold_bytes=134217728 --xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_enable_while_loop_double_buffering=true'
default CUDA_DEVICE_MAX_CONNECTIONS 1
default JAX_OPTIMIZATION_LEVEL O1
if ! command -v visor >/dev/null; then
  say "visor: not found on PATH; activate its environment where you submit this job"
  exit 2
fi

# --- one task per GPU; each records a status other than 0 ---
cpus=$((SLURM_CPUS_ON_NODE / 8))
[ "$cpus" -ge 1 ] || cpus=1
mkdir -p -- "$ended" || exit 1
task='
trap : TERM
"${@:2}"
status=$?
[ "$status" = 0 ] || echo "$status" >"$1/$SLURM_PROCID"
exit "$status"'
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $SLURM_NTASKS processes, restart $restarts of at most $max_restarts"
srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="$cpus" \
  --open-mode=append --output="$logs/first-%t.log" \
  bash -c "$task" task "$ended" \
  visor run --config=llava_ov_0p5b --workdir=/shared/first
status=$?

# --- what becomes of the job: a failure first, then the cause rather than its consequences ---
failed=
cause=
statuses=
for file in "$ended"/*; do
  [ -f "$file" ] || continue
  read -r one <"$file"
  statuses="$statuses ${file##*/}:$one"
  case $cause:$one in
    *:137) cause=137 ;;
    :134 | 143:134) cause=134 ;;
    :143) cause=143 ;;
    *:134 | *:143) ;;
    *) failed=${failed:-$one} ;;
  esac
done
rm -rf -- "$ended"
statuses="task:status${statuses:- none recorded}"
if [ -n "$failed" ]; then
  say "failed with $failed, not put back into the queue ($statuses)"
  exit "$failed"
fi
if [ "$status" = 0 ]; then
  say "complete"
  exit 0
fi
case ${cause:=$status} in
  143) reason="stopped by SIGTERM (143)" ;;
  134) reason="aborted because a process was lost (134)" ;;
  137) reason="a process was killed (137)" ;;
  *)
    say "srun ended with $status, not put back into the queue ($statuses)"
    exit "$status"
    ;;
esac
case $(scontrol --oneliner show job "$SLURM_JOB_ID") in
  *JobState=COMPLETING* | *JobState=CANCELLED*)
    say "$reason; Slurm ends this job, which was cancelled; not put back into the queue ($statuses)"
    exit "$cause"
    ;;
esac
if [ "$restarts" -ge "$max_restarts" ]; then
  say "$reason; not put back into the queue: restarted $restarts times, at most $max_restarts ($statuses)"
  exit "$cause"
fi
say "$reason; back into the queue, restart $((restarts + 1)) of at most $max_restarts ($statuses)"
if ! scontrol requeue "$SLURM_JOB_ID"; then
  say "Slurm does not put this job back into the queue: it was stopped, or the site does not allow it"
fi
exit "$cause"
VISOR_END

# make the folder of the logs
mkdir -p /shared/first/logs

# submit the job
sbatch --parsable visor-launch/first/visor.sbatch

# on stderr: visor (dry run): first: submitted as job 1; logs: /shared/first/logs/first.log, /shared/first/logs/first-0.log
