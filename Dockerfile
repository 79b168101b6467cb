# docker build -t nmm .                                    torch as pip finds it (CUDA on Linux x86)
# docker build -t nmm --build-arg TORCH_PIP_ARGS="--index-url URL" .   another build of torch
# docker run --rm -it --gpus all --shm-size 8g -v nmm-runs:/nmm/runs nmm make demo
# BASE: any Debian or Ubuntu image with Python 3.10-3.13 and its venv module.
ARG BASE=python:3.12-slim
FROM ${BASE}

# make for the two commands, a C compiler for the kernels that Triton builds at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home nmm \
    && install --directory --owner nmm /nmm /nmm/runs

USER nmm
WORKDIR /nmm
ENV VENV=/home/nmm/venv PATH=/home/nmm/venv/bin:$PATH PIP_NO_CACHE_DIR=1

ARG PYTHON
ARG TORCH
ARG TORCH_PIP_ARGS
COPY requirements.lock ./
COPY launch/install.sh launch/
RUN launch/install.sh

COPY --chown=nmm . .
CMD ["make", "help"]
