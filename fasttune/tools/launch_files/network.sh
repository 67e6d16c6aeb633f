# What NCCL and gloo may need on a cluster; without the # it is set:
# export NCCL_DEBUG=WARN              # INFO shows which network each rank uses
# export NCCL_SOCKET_IFNAME=eth0      # the interface that connects the machines: `ip -br addr` lists them
# export GLOO_SOCKET_IFNAME=eth0      # the same, for what the ranks tell each other
# export NCCL_IB_HCA=mlx5             # InfiniBand cards, if some are for storage only: `ibv_devices` lists them
# export NCCL_IB_DISABLE=1            # where InfiniBand is there and does not work: slower, over TCP
# export FASTTUNE_RANK_TIMEOUT_S=600  # seconds that ranks wait for one that is late within a step
