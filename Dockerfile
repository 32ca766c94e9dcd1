# Quire in a container; docs/containers.md tells how to build and run it.
#
#     base-cpu | base-gpu ──> packages ──> quire      one of the first two, by VARIANT
ARG BASE_IMAGE=python:3.12-slim
ARG VARIANT=cpu

FROM ${BASE_IMAGE} AS base-cpu
ENV QUIRE_DEVICE=cpu

FROM ${BASE_IMAGE} AS base-gpu
# Triton builds a small C launcher for each kernel, against Python's own headers; an official Python
# image has the headers, a distribution's Python has them in a package.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && if ! [ -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; \
       then apt-get install -y --no-install-recommends python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# ---------------------------------------------------------------------- what Quire runs with
FROM base-${VARIANT} AS packages
ARG VARIANT
# An index with another build of torch, such as the CPU one; empty takes the ordinary index's.
ARG TORCH_INDEX_URL=
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock requirements-otel.lock ./
# A CPU has no use for Triton's compiler, which is larger than everything else but torch. Headers and
# tests of torch are for building against it.
RUN python3 -m venv /opt/venv \
    && if [ "$VARIANT" = cpu ]; then sed -i '/^triton==/d' requirements.lock; fi \
    && if [ -n "$TORCH_INDEX_URL" ]; then \
         pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements.lock)"; fi \
    && pip install -r requirements-otel.lock \
    && cd /opt/venv/lib/python3*/site-packages \
    && rm -rf torch/test torch/include numba/tests \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find sympy -type d -name tests -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE /app/
COPY server/__init__.py /app/server/
RUN pip install --no-deps --no-build-isolation -e /app && pip uninstall -y setuptools pip

# ---------------------------------------------------------------------- the image
FROM base-${VARIANT} AS quire
WORKDIR /app
COPY --from=packages /opt/venv /opt/venv
COPY . .
RUN python3 -m compileall -q . \
    && mkdir -p /cache && chown 10001:0 /cache && chmod g=u /cache

# Compiled kernels and downloaded models outlive the container in one volume; it and /tmp are all
# that is written to. Group 0 may, so that platforms which pick their own user id work too.
ENV PATH=/opt/venv/bin:$PATH HOME=/cache USER=quire \
    HF_HOME=/cache/huggingface NUMBA_CACHE_DIR=/cache/numba TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    QUIRE_HOST=0.0.0.0 QUIRE_PORT=8000
VOLUME /cache
USER 10001:0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["quire", "health"]
ENTRYPOINT ["quire"]
CMD ["serve"]
