# syntax=docker/dockerfile:1
# One prefill or decode node. Build from the repository's root:
#   docker build -f deploy/docker/node.Dockerfile -t baton-node .
# EXTRA chooses the CUDA generation of UCX: cuda13 or cuda12. torch's wheels bring CUDA itself,
# so the driver and the NVIDIA container toolkit are all that a host needs.
# Without a GPU: --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG EXTRA=cuda13
ARG TORCH_INDEX_URL=
RUN python -m venv /opt/baton
WORKDIR /src
COPY . .
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
      /opt/baton/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" "torch>=2.11,<2.14"; \
    fi \
    && /opt/baton/bin/pip install --no-cache-dir ".[${EXTRA}]"

FROM ${PYTHON_IMAGE}
# gcc and libc6-dev: Triton compiles a small launcher for each kernel when it first runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
      tini gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BATON_HOST=0.0.0.0 \
    BATON_KV_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /home/baton
# gRPC, UCX listener, metrics
EXPOSE 9100 9200 9400
ENTRYPOINT ["tini", "--", "baton"]
CMD ["--help"]
