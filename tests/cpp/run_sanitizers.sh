#!/usr/bin/env bash
# The CPU kernels, without PyTorch, under ASan + UBSan and under TSan; and the kernels of instruction
# sets that this machine lacks, emulated, whose bits must be those of the ones it has.
#
# With CI_SHARE=2/6 the second sixth of all cases runs, and each sanitizer sees the kernels of one
# instruction set, the others' being as they are everywhere; one of the emulated sets runs. Which,
# depends on the share.
# With CPU_OBJECTS=FOLDER the kernels outside the sanitizers are those compiled there.
#
# Needs g++. Optional, each skipped with a line where it is missing (Debian packages):
#   libsimde-dev                          AVX-512 by emulated intrinsics
#   g++-aarch64-linux-gnu, qemu-user      NEON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly OUT=build/native
readonly FLAGS=(-std=c++17 -ffp-contract=off -fno-math-errno -Wall -Wextra -Icsrc -pthread)
readonly TEST=tests/cpp/test_kernels.cpp
readonly AROUND=(csrc/cpu/plan.cpp csrc/cpu/dispatch.cpp)
mkdir -p "$OUT"

# build NAME COMPILER "FLAGS" FILE... : compiles what changed, two at a time, and links $OUT/NAME. A
# file that is an object already is only linked.
build() {
  local name=$1 compiler=$2 flags=$3 source object objects=()
  shift 3
  mkdir -p "$OUT/$name.o"
  for source in "$@"; do
    if [[ $source == *.o ]]; then
      objects+=("$source")
      continue
    fi
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
# The instruction sets that are compiled here, and those of them that run here.
compiled=(baseline)
runs=(baseline)
if [[ $machine == x86_64 ]]; then
  compiled+=(avx2 avx512)
  has() {
    local flag
    for flag in "$@"; do grep -qw -m1 "$flag" /proc/cpuinfo || return 1; done
  }
  if has avx2 fma f16c; then runs+=(avx2); fi
  if has avx2 fma f16c avx512f avx512bw avx512dq avx512vl; then runs+=(avx512); fi
fi

# named PATTERN SET... : the pattern with each instruction set in place of its %.
named() { local set; for set in "${@:2}"; do echo "${1/\%/$set}"; done; }

echo "== all cases${CI_SHARE:+, share $CI_SHARE of them}"
objects=${CPU_OBJECTS:-$OUT/plain.o}
if [[ -n ${CPU_OBJECTS:-} ]]; then
  mapfile -t kernels < <(named "$objects/kernels_%.o" "${compiled[@]}")
  build plain g++ -O2 "$TEST" "$objects"/{plan,dispatch}.o "${kernels[@]}"
else
  mapfile -t kernels < <(named csrc/cpu/kernels_%.cpp "${compiled[@]}")
  build plain g++ -O2 "$TEST" "${AROUND[@]}" "${kernels[@]}"
fi
"$OUT/plain" ${CI_SHARE:+--share "$CI_SHARE"}

# sanitized NAME "FLAGS" SET... : with the kernels of these instruction sets under the sanitizer.
# Objects come last, as of a function that several files have the linker takes the first.
sanitized() {
  local name=$1 flags=$2 set sources=() others=()
  shift 2
  for set in "${compiled[@]}"; do
    if [[ " $* " == *" $set "* ]]; then
      sources+=("csrc/cpu/kernels_$set.cpp")
    else
      others+=("$objects/kernels_$set.o")
    fi
  done
  build "$name" g++ "$flags" "$TEST" "${AROUND[@]}" "${sources[@]}" "${others[@]}"
}
# Code that does not run needs no sanitizer.
for_address=("${runs[@]}")
for_thread=("${runs[@]}")
if [[ -n ${CI_SHARE:-} ]]; then
  turn=${CI_SHARE%/*}
  for_address=("${runs[turn % ${#runs[@]}]}")
  for_thread=("${runs[(turn + 1) % ${#runs[@]}]}")
fi

echo "== ASan + UBSan: ${for_address[*]}"
sanitized address "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" "${for_address[@]}"
ASAN_OPTIONS=detect_leaks=1 "$OUT/address" --quick

echo "== TSan: ${for_thread[*]}"
sanitized thread "-O1 -g1 -fsanitize=thread" "${for_thread[@]}"
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

# in_turn N: whether a share is for the Nth of the two; without shares both are.
in_turn() { [[ -z ${CI_SHARE:-} ]] || ((${CI_SHARE%/*} % 2 == $1)); }

echo "== AVX-512, emulated"
if ! in_turn 0; then
  echo "not in share $CI_SHARE"
elif [[ -d /usr/include/simde ]]; then
  build emulated_avx512 g++ "-O2 -Wno-psabi -mavx2 -mfma -mf16c -DGUMBEL_EXT_EMULATED_AVX512" "$TEST" \
    tests/cpp/kernels_avx512_emulated.cpp "$objects"/{plan,dispatch,kernels_baseline,kernels_avx2}.o
  same AVX-512 "$("$OUT/emulated_avx512" --quick --digest avx512)"
else
  echo "skipped: no libsimde-dev"
fi

echo "== NEON, emulated"
if ! in_turn 1; then
  echo "not in share $CI_SHARE"
elif command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
  build neon aarch64-linux-gnu-g++ "-O2 -static" "$TEST" "${AROUND[@]}" csrc/cpu/kernels_baseline.cpp
  same NEON "$(qemu-aarch64 "$OUT/neon" --quick --digest neon)"
else
  echo "skipped: no g++-aarch64-linux-gnu or no qemu-user"
fi
