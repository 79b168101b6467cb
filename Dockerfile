# The image of a GPU machine. CI does not build it; tests/test_image.py runs its steps without Docker.
#
# docker build -t nmm .                                    torch as pip finds it (CUDA on Linux x86)
# docker build -t nmm --build-arg TORCH_PIP_ARGS="--index-url URL" .   another build of torch
# docker run --rm -it --gpus all --shm-size 8g -v nmm-runs:/nmm/runs nmm make demo
# BASE: any Debian or Ubuntu image with Python 3.10-3.13 and its venv module.
ARG BASE=python:3.12.12-slim-bookworm
FROM ${BASE}

COPY launch/packages.sh /tmp/
RUN /tmp/packages.sh run && rm -rf /var/lib/apt/lists/* /tmp/packages.sh
RUN useradd --uid 1000 --create-home nmm && install --directory --owner nmm /nmm /nmm/runs

USER nmm
WORKDIR /nmm
ENV VENV=/home/nmm/venv PATH=/home/nmm/venv/bin:$PATH PIP_NO_CACHE_DIR=1
# What the container runtime puts into the image of the driver, when it is not asked by --gpus.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG PYTHON
ARG TORCH
ARG TORCH_PIP_ARGS
COPY requirements.lock ./
COPY launch/install.sh launch/
RUN launch/install.sh

COPY --chown=nmm . .
CMD ["make", "help"]
