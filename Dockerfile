# The course in a container, with everything that `make test` needs:
#     docker build -t peft-course .
#     docker run --rm -p 8888:8888 -v peft-work:/home/learner/course/work peft-course
# What learners do is in work/: the volume keeps it when the container goes.
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# chromium draws pages and slides in tests; a version of Debian's packages is the release's, so none is pinned
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 learner \
    && install --directory --owner=learner /home/learner/course /home/learner/course/work

USER 1000
WORKDIR /home/learner/course
ENV PATH=/home/learner/.venv/bin:$PATH OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

COPY --chown=learner . .

# The versions are those of constraints.txt. For a machine without a GPU, --build-arg WHEELS=… names an index with smaller wheels of torch.
ARG WHEELS=""
RUN python -m venv /home/learner/.venv \
    && python -m pip install --no-cache-dir ${WHEELS:+--extra-index-url "$WHEELS"} -c constraints.txt -e ".[test]"

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--ServerApp.root_dir=/home/learner/course"]
