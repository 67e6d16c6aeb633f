# On each of @NODES@ machines, HOST being the first of them:
torchrun --nnodes @NODES@ --nproc-per-node @GPUS@ --rdzv-id @NAME@ --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
  --shutdown-timeout 600 --no-python fasttune train @TRAIN@
