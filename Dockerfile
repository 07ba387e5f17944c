# syntax=docker/dockerfile:1
# The recipe and its pinned dependencies. TORCH chooses the build of torch: cpu, or cu130 for NVIDIA GPUs, whose CUDA
# libraries come as Python packages, so that one base image serves both. It has the C++ compiler that torch.compile needs.
ARG BASE=python:3.12
FROM ${BASE}
ARG TORCH=cpu

RUN useradd --create-home --uid 1000 trainer
WORKDIR /opt/functional-trainer
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY install install
COPY kernels kernels
COPY functional_trainer functional_trainer
COPY models models
COPY sharding_rules sharding_rules
COPY experiments experiments
RUN --mount=type=cache,target=/root/.cache/pip PIP_BUILD_CONSTRAINT=constraints.txt \
    pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/${TORCH} -e .

USER trainer
WORKDIR /data
ENTRYPOINT ["python", "/opt/functional-trainer/experiments/qwen3_moe_sft.py"]
