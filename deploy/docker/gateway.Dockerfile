# syntax=docker/dockerfile:1
# The HTTP edge: no torch, no CUDA. Build from the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t baton-gateway .
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/baton
WORKDIR /src
COPY . .
RUN /opt/baton/bin/pip install --no-cache-dir ".[gateway]"

FROM ${PYTHON_IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BATON_HOST=0.0.0.0
USER 10001
WORKDIR /home/baton
# The admin API stays on the container's loopback: `docker exec ... baton admin nodes`.
EXPOSE 8000
ENTRYPOINT ["tini", "--", "baton"]
CMD ["gateway"]
