# The gateway without torch: some 200 MB instead of gigabytes.
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# Third-party packages in a layer of their own: a change of our code does not fetch them again.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['serve'], sep='\n')" > /tmp/serve.txt \
    && pip install --no-cache-dir -r /tmp/serve.txt
COPY openlora openlora
COPY gateway gateway
COPY producer producer
COPY workers workers
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 1000 openlora \
    && install -d -o openlora /data/store /data/batches

USER openlora
WORKDIR /home/openlora
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
ENTRYPOINT ["openlora"]
CMD ["gateway"]
