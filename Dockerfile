# Trains and predicts on a GPU. The host needs an NVIDIA driver for CUDA 12.8 and the NVIDIA Container Toolkit.
#
#     docker build -t nnunet_semiseg .
#     docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v /path/to/data:/data \
#         nnunet_semiseg plan_and_preprocess -d 501 -c 3d_fullres
#     docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v /path/to/data:/data \
#         --entrypoint nnUNetv2_train nnunet_semiseg 501 3d_fullres 0 -tr SemiSegTrainer
#
# Without --shm-size the processes that load the data run out of shared memory. The folder /path/to/data holds nnU-Net's
# three folders.

FROM python:3.12-slim

# torch.compile compiles C code
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

# these wheels bring CUDA's runtime and cuDNN
RUN pip install --no-cache-dir torch==2.8.0 --index-url https://download.pytorch.org/whl/cu128

WORKDIR /opt/nnunet_semiseg
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nnunet_semiseg ./nnunet_semiseg
COPY trainers ./trainers
COPY planners ./planners
COPY dataset_conversion ./dataset_conversion
# wordllama is the text encoder that needs no download
RUN pip install --no-cache-dir ".[words]"

# any user may run it: caches and settings of libraries go to /tmp
ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results \
    HOME=/tmp \
    USER=nnunet \
    PYTHONUNBUFFERED=1

WORKDIR /data
ENTRYPOINT ["nnunet_semiseg"]
CMD ["--help"]
