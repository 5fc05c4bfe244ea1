# The environment of make env, for the CPU:
#     docker build -t overlock_mm .
# or for CUDA, with the architectures of your GPUs:
#     docker build -t overlock_mm --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu22.04 --build-arg FORCE_CUDA=1 \
#         --build-arg TORCH="-r requirements/torch.txt" --build-arg TORCH_CUDA_ARCH_LIST="8.0;9.0" .
# Then: docker run --rm -it [--gpus all] overlock_mm make demo
ARG BASE=ubuntu:22.04
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git libgl1 libglib2.0-0 make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG FORCE_CUDA=0
ARG TORCH="torch==2.11.0+cpu torchvision==0.26.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0"
# make reads these, in later calls too.
ENV FORCE_CUDA=${FORCE_CUDA} TORCH=${TORCH} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} PIP_NO_CACHE_DIR=1

# First what changes rarely: a change of the package does not build mmcv again.
WORKDIR /overlock_mm
COPY Makefile ./
COPY requirements requirements
COPY tools/install_mmcv.py tools/
RUN make mmcv

COPY . .
RUN make env
ENV PATH=/overlock_mm/.venv/bin:${PATH}
CMD ["bash"]
