#!/bin/bash
# sbatch THIS-FILE. Five minutes before its time is over the run saves and the job is queued again; it then resumes.
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@GPUS@
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# The output folder, the data and the caches must lie on a disk that all machines share.
@NETWORK@
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again() {
    scancel --signal=TERM "$SLURM_JOB_ID.0" # every rank ends its step, one checkpoint is written
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node @GPUS@ --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --shutdown-timeout 240 \
    --no-python fasttune train @TRAIN@ --resume &
step=$!
wait "$step"
