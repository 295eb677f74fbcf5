# The image of a run on NVIDIA GPUs. The repository is the build context, and .dockerignore keeps the rest of it out:
#
#   docker build --file launch/docker/cuda.Dockerfile --tag REGION-docker.pkg.dev/PROJECT/REPOSITORY/visor:TAG .
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/visor:TAG
#
# On a machine with NVIDIA GPUs (data workers need more shared memory than Docker's 64 MB, and a stopped run
# needs time to save):
#
#   docker run --init --gpus=all --shm-size=16g --stop-timeout=300 IMAGE run --config=... --workdir=...
#
# launch/docker/cuda.txt and requirements.txt pin every package.

FROM python:3.12.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements.txt launch/docker/cuda.txt ./
RUN python -m pip install --constraint requirements.txt setuptools \
    && python -m venv /opt/visor
COPY LICENSE README.md pyproject.toml ./
COPY configs configs
COPY visor_jax visor_jax
COPY visor_jax_data visor_jax_data
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && wheel="$(echo /wheels/visor_jax-*.whl)" \
    && /opt/visor/bin/python -m pip install --constraint requirements.txt --constraint cuda.txt "${wheel}[cuda,gcs]" \
    && /opt/visor/bin/visor --version

FROM python:3.12.12-slim-bookworm
RUN groupadd --gid 1000 visor && useradd --uid 1000 --gid 1000 --create-home visor
COPY --from=build /opt/visor /opt/visor
ENV PATH=/opt/visor/bin:$PATH PYTHONUNBUFFERED=1
# Where GKE mounts the driver, and what NVIDIA's container toolkit is asked for.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/visor
ENTRYPOINT ["visor"]
CMD ["--help"]
