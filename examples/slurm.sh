#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/slurm.sh. One torchrun a node, started by srun; they meet at the first node.
#SBATCH --job-name=autopar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out

set -euo pipefail

HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export HEAD_NODE
export OMP_NUM_THREADS=8

# Five minutes before the end Slurm sends TERM to this shell, which passes it on: the ranks end their step, save, and stop.
# A job that is requeued goes on from the latest checkpoint: --resume starts at step 0 where there is none.
# shellcheck disable=SC2016 # the names in quotes are those of each node's shell
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --shutdown-timeout 240 \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD_NODE:29500" \
        -m autopar train tiny:llama --mesh dp=2,tp=8 --zero 1 --precision bf16 --no-compare \
        --steps 100000 --checkpoint "$SLURM_SUBMIT_DIR/run" --every 500 --resume --log-file "$SLURM_SUBMIT_DIR/log.jsonl"
' &
JOB=$!
trap 'kill -TERM "$JOB"' TERM
wait "$JOB" || wait "$JOB" # the first wait ends when the signal comes
