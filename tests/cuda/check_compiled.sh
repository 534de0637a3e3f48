#!/usr/bin/env bash
# The extension compiled for CUDA, as far as that can be looked at without a GPU: no warning, no
# spill, the machine code as check_binary.py wants it, imported, and traced on fake CUDA tensors.
#
#   bash tests/cuda/check_compiled.sh
#
# With CI_SHARE=1/6 for sm_90, with 4/6 for sm_80, with another share nothing: it takes as long as
# most other checks together, and the emulation compiles the same kernels. Without a share for both.
# Makes .venv-cuda with a CUDA build of torch (5 GB) on first use. Without nvcc there is nothing to
# check: it says so and succeeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v nvcc > /dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  echo "skipped: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
  exit 0
fi

case ${CI_SHARE:-} in
  '') architectures="8.0;9.0+PTX" ;;
  1/*) architectures=9.0+PTX ;;
  4/*) architectures=8.0 ;;
  *)
    echo "skipped in share $CI_SHARE: shares 1/6 and 4/6 compile"
    exit 0
    ;;
esac

venv=.venv-cuda
out=build/cuda-check
export PATH="$PWD/$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 MAX_JOBS=${MAX_JOBS:-2}

if [ ! -e $venv/.requirements ] || [ requirements-dev.txt -nt $venv/.requirements ]; then
  "${PYTHON:-python3}" -m venv --clear $venv
  # "===" takes the index's own build, which has CUDA, where a build for the CPU lies nearer at hand.
  # What only other tests need stays away.
  sed -e 's/^torch==/torch===/' -e '/^\(cmake\|onnx\|transformers\|vector-quantize\)/d' \
    requirements-dev.txt > $venv/requirements.txt
  pip install --quiet --requirement $venv/requirements.txt \
    nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm
  touch $venv/.requirements
fi

# Spills and local memory are warnings of the assembler; all warnings are errors. That double
# precision is used by the float64 kernels alone is left to check_binary.py, as the assembler's own
# warning knows no exceptions.
export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$architectures
echo "compiled for $architectures"
# Of the code for the CPU nothing is measured here, and most runs in other tests.
export CXX_APPEND_FLAGS=-O0
export NVCC_APPEND_FLAGS="-Xptxas=-warn-spills,-warn-lmem-usage -Werror all-warnings"
rm -rf $out
pip install --quiet --no-build-isolation --no-deps --target $out .

python tests/cuda/check_binary.py $out/gumbel_ext/_C*.so "$@"

# From the folder of the build, so that it is the one imported.
root=$PWD
cd $out
python -c '
import gumbel_ext._C as module
info = module.build_info()
assert info["cuda"] is not None, info
print("imported, built with CUDA:", info["cuda"])'
python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" \
  "$root/tests/test_cuda_trace.py"
