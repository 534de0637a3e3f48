#!/usr/bin/env bash
# Runs the CUDA kernels on the CPU: in four scheduling orders, with the race detector, and under
# ASan + UBSan. planted_bugs.py shows that bugs in the kernels do not get past it, test_emulation.cpp
# that the emulation itself sees what it should.
#
#   bash tests/cuda/run_emulation.sh [build folder]
#
# With CI_SHARE=2/6 float32 and one more type run, one of them under ASan; which, depends on the share.
# Races of float32 and of the rest of the family are then left to planted_bugs.py, which compiles the
# same for them and runs it without a bug, too.
# With CPU_OBJECTS=FOLDER the CPU kernels to compare with are those compiled there.
#
# Needs g++, no CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-build/cuda-emulation}
mkdir -p "$out"
cxx=${CXX:-g++}
jobs=${MAX_JOBS:-2}
flags="-std=c++20 -g -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
flags+=" -DGUMBEL_EXT_EMULATE_CUDA -Itests/cuda -Icsrc/cuda"
# fma() as one instruction, not a function: ten times faster.
if [ "$(uname -m)" = x86_64 ] && grep -qw fma /proc/cpuinfo; then flags+=" -mfma"; fi
types=(float double BFloat16 Half)
if [[ -n ${CI_SHARE:-} ]]; then
  types=(float "${types[1 + ${CI_SHARE%/*} % 3]}")
  echo "share $CI_SHARE: ${types[*]}"
fi

# in_parallel: each line of its input is a command; any that fails fails the script.
in_parallel() { xargs -P "$jobs" -d '\n' -I{} bash -c '{}'; }

# The other files' objects, without sanitizers: they are tested elsewhere.
cpu="plan kernels_baseline"
if [ "$(uname -m)" = x86_64 ]; then cpu+=" kernels_avx2"; fi
sources=csrc/cuda/plan.cpp
rm -f "$out"/csrc-*.o
for name in $cpu; do
  if [[ -n ${CPU_OBJECTS:-} ]]; then
    cp "$CPU_OBJECTS/$name.o" "$out/csrc-cpu-$name.o"
  else
    sources+=" csrc/cpu/$name.cpp"
  fi
done
for source in $sources; do
  echo "$cxx -std=c++20 -O2 -ffp-contract=off -c $source -o $out/$(echo "${source%.cpp}" | tr / -).o"
done | in_parallel
rm -f "$out/shared.a"
ar rcs "$out/shared.a" "$out"/csrc-*.o

# build NAME "flags" "flags of the kernels alone": $out/NAME-TYPE for every type.
build() {
  local name=$1 all=$2 kernels=$3 type
  $cxx $flags $all -c tests/cuda/emulation.cpp -o "$out/$name-emulation.o"
  for type in "${types[@]}"; do
    echo "$cxx $flags $all $kernels -DGUMBEL_EXT_TYPE=$type -c tests/cuda/test_gumbel_softmax_kernels.cpp" \
      "-o $out/$name-$type.o && $cxx $all $out/$name-emulation.o $out/$name-$type.o" \
      "$out/shared.a -o $out/$name-$type"
  done | in_parallel
}
# run NAME "environment"
run() {
  local name=$1 environment=$2 type
  for type in "${types[@]}"; do
    echo "env $environment $out/$name-$type > $out/$name-$type.log" \
      "|| { cat $out/$name-$type.log; exit 255; }"
  done | in_parallel
  for type in "${types[@]}"; do echo "  $type: $(tail -n 1 "$out/$name-$type.log")"; done
}

echo "== the emulation's own tests"
$cxx $flags -O1 -fsanitize=thread -c tests/cuda/test_emulation.cpp -o "$out/test_emulation.o"
$cxx $flags -O2 -c tests/cuda/emulation.cpp -o "$out/emulation.o"
$cxx "$out/emulation.o" "$out/test_emulation.o" -o "$out/test_emulation"
"$out/test_emulation" | tail -n 1

# Kernels of the rest of the family, all types in one program each: family TESTS NAME "flags" "flags of
# the kernels alone" "environment".
family() {
  local program=$out/$2-$1
  $cxx $flags $3 $4 -c "tests/cuda/test_$1_kernels.cpp" -o "$program.o"
  $cxx $3 "$out/$2-emulation.o" "$program.o" -o "$program"
  env $5 "$program" > "$program.log" || { cat "$program.log"; exit 1; }
  echo "  $1: $(tail -n 1 "$program.log")"
}

build plain "-O1" ""
for order in in_order reverse random greedy; do
  echo "== threads run $order"
  run plain "GUMBEL_EXT_ORDER=$order"
done

# What follows is about addresses, where bfloat16 is float16.
in_turn=(float double Half)
if [[ -n ${CI_SHARE:-} ]]; then
  types=("${types[1]/BFloat16/Half}")
  in_turn=("${in_turn[${CI_SHARE%/*} % 3]}")
else
  types=("${in_turn[@]}")
fi

echo "== races"
build race "-O1" "-fsanitize=thread"
run race "GUMBEL_EXT_QUICK=1"
if [[ -z ${CI_SHARE:-} ]]; then
  family binary_concrete race "-O1" "-fsanitize=thread" "GUMBEL_EXT_ORDER=random"
  # Not under ASan too: the hooks see what lies off an array, and two thirds of a minute are saved.
  family concrete race "-O1" "-fsanitize=thread" "GUMBEL_EXT_ORDER=random GUMBEL_EXT_QUICK=1"
  family deterministic race "-O1" "-fsanitize=thread" "GUMBEL_EXT_ORDER=random GUMBEL_EXT_QUICK=1"
  family estimators race "-O1" "-fsanitize=thread" "GUMBEL_EXT_ORDER=random GUMBEL_EXT_QUICK=1"
fi

types=("${in_turn[@]}")
echo "== ASan + UBSan"
build asan "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all" ""
run asan "GUMBEL_EXT_QUICK=1 ASAN_OPTIONS=detect_leaks=0"
family binary_concrete asan "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all" "" "ASAN_OPTIONS=detect_leaks=0"
