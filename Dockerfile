# syntax=docker/dockerfile:1.10
#
# The worker. docs/deploy-runpod.md says how to build and run it; tests/test_image.py checks the
# rules kept here and executes the steps that need neither a network nor a GPU.
#
# Base: Python's own slim image. The wheels of PyTorch bring CUDA and cuDNN, the host brings the
# driver, so that a CUDA image would add its libraries a second time. Debian 12 has the glibc that
# the wheels ask for, and the C compiler that Triton needs.
#
# Layers go from what never changes to what always does: system, PyTorch, other packages, weights,
# code, settings. A change of the code pushes a few megabytes.

FROM python:3.12.12-slim-bookworm AS base

# gcc, libc6-dev: Triton compiles small C stubs at run time; Python.h comes with the base image.
# libgl1, libglib2.0-0: the OpenCV that comes with ultralytics, for who adds that detector.
# libtcmalloc-minimal4: frames of many sizes fragment glibc's heap. tini: reaps children and passes
# SIGTERM on. No ssh, git, wget or curl: nothing here fetches at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates \
        gcc \
        libc6-dev \
        libgl1 \
        libglib2.0-0 \
        libtcmalloc-minimal4 \
        tini \
    && rm -rf /var/lib/apt/lists/* \
    && test -f /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 \
    && groupadd --gid 10001 xicon \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin xicon \
    && install --directory --owner=10001 --group=10001 /app /cache /models /tmp/xicon


FROM base AS packages

# default: PyTorch 2.11 for CUDA 12.8. xformers: PyTorch 2.10 with xformers' kernels. cuda13: what
# the tests passed with, for hosts with a driver for CUDA 13.
ARG TORCH_VARIANT=default
COPY docker/torch-*.txt docker/cudnn-*.txt /build/
RUN pip install --no-cache-dir --requirement "/build/torch-${TORCH_VARIANT}.txt" \
    && pip install --no-cache-dir --no-deps --requirement "/build/cudnn-${TORCH_VARIANT}.txt"

COPY docker/packages.txt /build/
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement /build/packages.txt

# Names or addresses of wheels, separated by blanks, as of flash-attn built for this PyTorch. One
# that cannot be installed is left out: the worker takes the next kernel and says so.
ARG ATTENTION_WHEELS=""
RUN for wheel in ${ATTENTION_WHEELS}; do \
        pip install --no-cache-dir --no-deps --only-binary=:all: "${wheel}" \
        || echo "left out, cannot be installed: ${wheel}"; \
    done; \
    pip list


# What fetches weights. Its layers are not in the image; only the files it fetches are copied.
FROM packages AS fetch
WORKDIR /source
COPY weights_manifest.json weights_manifest.schema.json ./
COPY docker/bake.py docker/
COPY xicon_infer/ xicon_infer/
COPY pipelines/ pipelines/
# A file without a pinned sha256 fails the build unless this is true; `xicon-infer weights lock`
# pins them.
ARG ALLOW_UNPINNED_WEIGHTS=false
ENV PYTHONPATH=/source \
    WEIGHTS_STORE=/fetched \
    WEIGHTS_TARGET=/models \
    ALLOW_UNPINNED_WEIGHTS=${ALLOW_UNPINNED_WEIGHTS}


FROM fetch AS weights-scail
ARG BAKE_SCAIL=false
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_SCAIL}" scail/fp8:transformer


FROM fetch AS weights-steady-dancer
ARG BAKE_STEADYDANCER=false
ARG STEADYDANCER_VARIANT=fp8
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_STEADYDANCER}" \
        "steady_dancer/${STEADYDANCER_VARIANT}:transformer"


FROM fetch AS weights-wan-i2v
ARG BAKE_WAN_I2V=false
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_WAN_I2V}" wan_i2v/fp8:transformer


FROM fetch AS weights-wan-t2v
ARG BAKE_WAN_T2V=false
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_WAN_T2V}" wan_t2v/fp8:transformer


# What every model shares; any BAKE_ of a model asks for it.
FROM fetch AS weights-shared
ARG BAKE_SCAIL=false
ARG BAKE_STEADYDANCER=false
ARG BAKE_WAN_I2V=false
ARG BAKE_WAN_T2V=false
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py \
        --if "${BAKE_SCAIL}" --if "${BAKE_STEADYDANCER}" \
        --if "${BAKE_WAN_I2V}" --if "${BAKE_WAN_T2V}" \
        scail/fp8:text_encoder scail/fp8:tokenizer scail/fp8:image_encoder scail/fp8:vae


FROM fetch AS weights-lora
ARG BAKE_LORA=false
ARG BAKE_WAN_T2V=false
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_LORA}" scail/fp8:lora \
    && python docker/bake.py --if "${BAKE_LORA}" --and "${BAKE_WAN_T2V}" wan_t2v/fp8:lora


FROM fetch AS weights-pose
ARG BAKE_POSE=false
# pose/default holds NLF, which is for non-commercial research only; pose/commercial does not.
ARG POSE_PRESET=default
RUN --mount=type=cache,id=xicon-weights,target=/fetched,sharing=locked \
    --mount=type=secret,id=hf_token,env=HF_TOKEN \
    python docker/bake.py --if "${BAKE_POSE}" "pose/${POSE_PRESET}"


FROM packages AS worker
ARG TORCH_VARIANT=default

# One layer each, the largest first; empty where nothing was baked.
COPY --link --from=weights-scail /models/ /models/
COPY --link --from=weights-steady-dancer /models/ /models/
COPY --link --from=weights-wan-i2v /models/ /models/
COPY --link --from=weights-wan-t2v /models/ /models/
COPY --link --from=weights-shared /models/text_encoders/ /models/text_encoders/
COPY --link --from=weights-shared /models/clip_vision/ /models/clip_vision/
COPY --link --from=weights-shared /models/vae/ /models/vae/
COPY --link --from=weights-lora /models/ /models/
COPY --link --from=weights-pose /models/ /models/

WORKDIR /build/xicon-infer
COPY pyproject.toml README.md LICENSE weights_manifest.json weights_manifest.schema.json ./
COPY xicon_infer/ xicon_infer/
COPY pipelines/ pipelines/
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

WORKDIR /app
COPY docker/check_image.py /build/
RUN python /build/check_image.py "/build/torch-${TORCH_VARIANT}.txt" "/build/cudnn-${TORCH_VARIANT}.txt"
COPY handler.py test_input.json ./

# HF_HUB_OFFLINE: nothing is fetched at run time; set it to 0 beside XICON_DOWNLOAD=1.
# RUNPOD_LOG_LEVEL: the SDK's default logs whole answers, presigned addresses included.
ENV PYTHONUNBUFFERED=1 \
    RUNPOD_LOG_LEVEL=INFO \
    HF_HUB_OFFLINE=1 \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XDG_CACHE_HOME=/cache \
    XICON_CACHE_DIR=/cache/xicon-infer \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4

USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-u", "handler.py"]
