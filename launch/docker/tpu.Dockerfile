# The image of a run on TPUs. The repository is the build context, and .dockerignore keeps the rest of it out:
#
#   docker build --file launch/docker/tpu.Dockerfile --tag REGION-docker.pkg.dev/PROJECT/REPOSITORY/visor:TAG .
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/visor:TAG
#
# On a machine with TPUs (data workers need more shared memory than Docker's 64 MB, and a stopped run
# needs time to save):
#
#   docker run --init --privileged --network=host --shm-size=16g --stop-timeout=300 IMAGE run --config=... --workdir=...
#
# launch/docker/tpu.txt and requirements.txt pin every package.

FROM python:3.12.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements.txt launch/docker/tpu.txt ./
RUN python -m pip install --constraint requirements.txt setuptools \
    && python -m venv /opt/visor
COPY LICENSE README.md pyproject.toml ./
COPY configs configs
COPY visor_jax visor_jax
COPY visor_jax_data visor_jax_data
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && wheel="$(echo /wheels/visor_jax-*.whl)" \
    && /opt/visor/bin/python -m pip install --constraint requirements.txt --constraint tpu.txt "${wheel}[tpu,gcs]" \
    && /opt/visor/bin/visor --version

FROM python:3.12.12-slim-bookworm
RUN groupadd --gid 1000 visor && useradd --uid 1000 --gid 1000 --create-home visor
COPY --from=build /opt/visor /opt/visor
ENV PATH=/opt/visor/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/visor
ENTRYPOINT ["visor"]
CMD ["--help"]
