# fasttune on NVIDIA GPUs; docs/compatibility.md says what was seen of this file. In the folder of the checkout:
#   docker build --tag fasttune .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" fasttune train config.yaml
# For a driver before 580, with the other stack:
#   docker build --build-arg STACK=cu12 --build-arg CUDA=12.8.1 --tag fasttune .
ARG CUDA=13.0.1
# `base` holds the CUDA runtime only: the math libraries come with the stack, in the versions that PyTorch pins.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG STACK=cu130

# gcc and Python's headers: with these Triton compiles, at the first step of a run. No versions, for Ubuntu's archive
# keeps the newest one only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-pip \
    && rm -rf /var/lib/apt/lists/*

# The project's own set-up: pins with hashes, then every check that needs no GPU. While an image is built there is none, so
# the stack is named. Compiled here, for whoever runs it cannot write here. All caches are below /tmp, and removed.
WORKDIR /opt/fasttune
COPY . .
RUN export XDG_CACHE_HOME=/tmp/cache UV_COMPILE_BYTECODE=1 \
    && bash scripts/setup_h100.sh --stack "$STACK" --flash-attn skip \
    && .venv/bin/python -m compileall -q fasttune \
    && rm -rf /tmp/*

# No root. Files in /work belong to user 1000, or to that of `docker run --user`, who has a home here too: caches, tokens.
RUN install --directory --mode 1777 /home/fasttune /work
ENV HOME=/home/fasttune USER=fasttune PATH=/opt/fasttune/.venv/bin:$PATH
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["fasttune"]
CMD ["--help"]
