# harmconvert on processors. From the folder with your files:
#   docker run --rm -v "$PWD:/work" harmconvert convert sample:resnet_mnist5k --lambda progressive
FROM python:3.12-slim
# A compiler builds the kernel of the factored form at first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# The build of PyTorch for processors: the default one brings 6 GB of libraries for GPUs.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[samples,report,openvino]'
# Caches also work for a user without a home: docker run --user "$(id -u):$(id -g)" ...
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["harmconvert"]
CMD ["--help"]
