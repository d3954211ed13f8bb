# Trains and predicts on a GPU. The host needs an NVIDIA driver and the NVIDIA Container Toolkit.
#
#     docker build -t nnunet_semiseg .
#     docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v /path/to/data:/data \
#         nnunet_semiseg plan_and_preprocess -d 501 -c 3d_fullres
#     docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v /path/to/data:/data \
#         --entrypoint nnUNetv2_train nnunet_semiseg 501 3d_fullres 0 -tr SemiSegTrainer
#
# Without --shm-size the processes that load the data run out of shared memory.

# CUDA's runtime, cuDNN and PyTorch, in versions that belong together
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime

# torch.compile compiles C code
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nnunet_semiseg
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nnunet_semiseg ./nnunet_semiseg
COPY trainers ./trainers
COPY planners ./planners
COPY dataset_conversion ./dataset_conversion
# PyTorch of the image stays; wordllama is the text encoder that needs no download
RUN pip install --no-cache-dir ".[words]"

ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results \
    HOME=/tmp \
    USER=nnunet \
    PYTHONUNBUFFERED=1

WORKDIR /data
ENTRYPOINT ["nnunet_semiseg"]
CMD ["--help"]
