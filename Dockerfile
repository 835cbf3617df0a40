# One service, or the trace collector: `docker build --build-arg SERVICE=ingest .`
# What it needs is a layer of its own, which only a change of its dependencies makes again.
FROM python:3.11-bookworm AS wanted
ARG SERVICE
COPY pyproject.toml /
RUN python3 -c 'import tomllib; p = tomllib.load(open("/pyproject.toml", "rb"))["project"]; \
    print(*p["dependencies"], *p["optional-dependencies"]["'$SERVICE'"], sep="\n")' >/wanted.txt

# The inference service's front and operators and the scheduler's pool in C++, as wheels; an empty folder for the
# others.
FROM python:3.11-bookworm AS native
ARG SERVICE
COPY constraints.txt /src/
COPY native /src/native
RUN mkdir -p /src/dist/native; case $SERVICE in \
    inference) extension="leptonic_native leptonic_ops"; library=libnghttp2-dev ;; \
    scheduler) extension=leptonic_placement; library= ;; \
    *) exit 0 ;; \
    esac; \
    headers=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])') \
    && apt-get update -q && apt-get install -y -q --no-install-recommends g++ $library \
       $([ -e "$headers/Python.h" ] || echo python3-dev) \
    && pip install --no-cache-dir -q --root-user-action=ignore -c /src/constraints.txt nanobind \
    && python3 /src/native/build.py wheel $extension

FROM python:3.11-bookworm AS build
RUN pip install --no-cache-dir -q --root-user-action=ignore uv==0.13.8
ARG TORCH_BACKEND=cpu
COPY constraints.txt /
COPY --from=wanted /wanted.txt /
# A build image that sets UV_FIND_LINKS is an air-gapped builder's, with torch in that folder;
# elsewhere uv picks the torch build for the backend.
RUN --mount=type=cache,target=/root/.cache/uv \
    [ -n "$UV_FIND_LINKS" ] || backend=--torch-backend=$TORCH_BACKEND; \
    uv venv -q /venv \
    && uv pip install -q -p /venv --compile-bytecode $backend -c /constraints.txt -r /wanted.txt \
    && rm -rf /venv/lib/python3.11/site-packages/onnx/backend/test
COPY --from=native /src/dist/native /native
RUN [ -z "$(ls /native)" ] || uv pip install -q -p /venv --no-index --no-deps /native/*.whl
ARG SERVICE
COPY libs /app/libs
COPY stack /app/stack
COPY services /app/services
RUN cd /app/services && for one in */; do [ "$one" = "$SERVICE/" ] || rm -r "$one"; done \
    && { [ "$SERVICE" = collector ] || rm -r /app/stack; } && python3 -m compileall -q /app

FROM python:3.11-slim-bookworm
ARG SERVICE
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="leptonic-$SERVICE" \
      org.opencontainers.image.description="Leptonic: the service $SERVICE" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin leptonic \
    && mkdir /data && chown leptonic /data
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SERVICE=$SERVICE
USER 10001
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=5 \
    CMD ["python", "-I", "-S", "libs/doors/healthy.py"]
CMD ["sh", "-c", "exec python -m services.$SERVICE"]
