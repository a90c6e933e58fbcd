# One image for CPU and NVIDIA workers: CUDA's libraries come with torch, the driver from the host.
# For a much smaller CPU image, build with PyTorch's CPU wheel index:
#   docker compose build --build-arg PIP_EXTRA_INDEX_URL=… worker-cpu
FROM python:3.12-slim

# Triton compiles the launchers of its kernels at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# Third-party packages in a layer of their own: a change of our code does not fetch them again.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['serve'], sep='\n')" > /tmp/worker.txt \
    && pip install --no-cache-dir -c constraints.txt -r /tmp/worker.txt
COPY openlora openlora
COPY gateway gateway
COPY producer producer
COPY workers workers
COPY docker/worker_health.py /usr/local/bin/worker-health
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 1000 openlora \
    && install -d -o openlora /data/store /data/cache

USER openlora
WORKDIR /home/openlora
ENV PYTHONUNBUFFERED=1 HF_HOME=/data/cache/huggingface TRITON_CACHE_DIR=/data/cache/triton
ENTRYPOINT ["openlora"]
CMD ["worker"]
