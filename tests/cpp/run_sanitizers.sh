#!/usr/bin/env bash
# The CPU kernels, without PyTorch, under ASan + UBSan and under TSan; and the kernels of instruction
# sets that this machine lacks, emulated, whose bits must be those of the ones it has.
#
# Needs g++. Optional, each skipped with a line where it is missing (Debian packages):
#   libsimde-dev                          AVX-512 by emulated intrinsics
#   g++-aarch64-linux-gnu, qemu-user      NEON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly OUT=build/native
readonly FLAGS=(-std=c++17 -ffp-contract=off -fno-math-errno -Wall -Wextra -Icsrc -pthread)
readonly PLAIN=(tests/cpp/test_kernels.cpp csrc/cpu/plan.cpp csrc/cpu/dispatch.cpp csrc/cpu/kernels_baseline.cpp)
readonly X86=(csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
mkdir -p "$OUT"

# build NAME COMPILER "FLAGS" SOURCE... : compiles what changed, two at a time, and links $OUT/NAME.
build() {
  local name=$1 compiler=$2 flags=$3 source object objects=()
  shift 3
  mkdir -p "$OUT/$name.o"
  for source in "$@"; do
    object="$OUT/$name.o/$(basename "$source" .cpp).o"
    objects+=("$object")
    if [[ -z $(find csrc tests/cpp -newer "$object" 2>/dev/null) && -f $object ]]; then continue; fi
    # shellcheck disable=SC2086
    "$compiler" "${FLAGS[@]}" $flags -c "$source" -o "$object" &
    if (($(jobs -rp | wc -l) >= ${MAX_JOBS:-2})); then wait -n; fi
  done
  local pid
  for pid in $(jobs -p); do wait "$pid"; done
  # shellcheck disable=SC2086
  "$compiler" "${FLAGS[@]}" $flags "${objects[@]}" -o "$OUT/$name"
}

machine=$(uname -m)
native=("${PLAIN[@]}")
if [[ $machine == x86_64 ]]; then native+=("${X86[@]}"); fi

echo "== all cases"
build plain g++ "-O2" "${native[@]}"
"$OUT/plain"

echo "== ASan + UBSan"
build address g++ "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" "${native[@]}"
ASAN_OPTIONS=detect_leaks=1 "$OUT/address" --quick

echo "== TSan"
build thread g++ "-O1 -g1 -fsanitize=thread" "${native[@]}"
# Newer kernels randomise addresses more than this TSan's shadow memory allows for.
setarch "$machine" --addr-no-randomize "$OUT/thread" --quick

if [[ $machine != x86_64 ]] || ! grep -q -m1 avx2 /proc/cpuinfo; then
  echo "== emulated instruction sets: skipped, there is no AVX2 here to compare with"
  exit 0
fi
expected=$("$OUT/plain" --quick --digest avx2)

same() {
  if [[ $2 != "$expected" ]]; then
    echo "FAILED $1: bits $2, AVX2 has $expected"
    exit 1
  fi
  echo "$1: the bits of AVX2 ($expected)"
}

echo "== AVX-512, emulated"
if [[ -d /usr/include/simde ]]; then
  build emulated_avx512 g++ "-O2 -Wno-psabi -mavx2 -mfma -mf16c -DGUMBEL_EXT_EMULATED_AVX512" "${PLAIN[@]}" \
    csrc/cpu/kernels_avx2.cpp tests/cpp/kernels_avx512_emulated.cpp
  same AVX-512 "$("$OUT/emulated_avx512" --quick --digest avx512)"
else
  echo "skipped: no libsimde-dev"
fi

echo "== NEON, emulated"
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
  build neon aarch64-linux-gnu-g++ "-O2 -static" "${PLAIN[@]}"
  same NEON "$(qemu-aarch64 "$OUT/neon" --quick --digest neon)"
else
  echo "skipped: no g++-aarch64-linux-gnu or no qemu-user"
fi
