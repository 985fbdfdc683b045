# syntax=docker/dockerfile:1
# omninft with CUDA: torch from PyPI brings its own CUDA libraries, so the host needs the NVIDIA driver and container toolkit alone.
#   docker build -t omninft .
#   docker run --gpus all --user "$(id -u)" -v "$PWD:/work" omninft train
# Weights of other models: -v "$HOME/.cache/huggingface:/weights" -e HF_HOME=/weights

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="omninft" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    # Where any user may write: numba (within librosa) would cache beside its own files, and fail.
    NUMBA_CACHE_DIR=/tmp/numba
COPY requirements.lock /requirements.lock
# The largest part first, in a layer that a change of omninft leaves as it is; the lock is a constraint, its tools stay out.
RUN pip install --constraint /requirements.lock torch
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --constraint /requirements.lock /wheels/*.whl
RUN useradd --create-home omninft && install --directory --owner=omninft /work
USER omninft
WORKDIR /work
ENTRYPOINT ["omninft"]
CMD ["--help"]
