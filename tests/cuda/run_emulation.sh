#!/ usr / bin / env bash
#Runs the CUDA kernels on the CPU : in four scheduling orders, with the race detector, and under
#ASan + UBSan.Then plants bugs in them, one at a time, each of which must be caught.
#
#bash tests / cuda / run_emulation.sh[build folder]
#
#Needs g++, no CUDA.
set - euo pipefail cd "$(dirname " $ { BASH_SOURCE[0] }
")/../.."

    out = ${1 : -build / cuda - emulation} mkdir - p "$out" cxx =
${CXX : -g++} flags = "-std=c++20 -g -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas" flags +=
    " -DGUMBEL_EXT_EMULATE_CUDA -Itests/cuda -Icsrc/cuda"
#fma() as one instruction, not a function : ten times faster.
    if["$(uname -m)" = x86_64] &&
    grep - qw fma / proc / cpuinfo;
then fma = -mfma;
else fma = ;
fi
#build NAME \
    "flags" \
    "flags of the kernels alone"
build() {
  local name = $1 all = $2 kernels = $3
#shellcheck disable = SC2086
      {$cxx $flags $all - c tests / cuda / emulation.cpp -
       o "$out/$name-emulation.o" $cxx $flags $all $fma $kernels -
       c tests / cuda / test_cuda_kernels.cpp -
       o "$out/$name-kernels.o" $cxx $all
         "$out/$name-emulation.o"
         "$out/$name-kernels.o"
         "$out/shared.a" -
       o "$out/$name"}
}

objects=()
for source in csrc/cuda/plan.cpp csrc/cpu/plan.cpp csrc/cpu/kernels_baseline.cpp \
    $([ "$(uname -m)" = x86_64 ] && echo csrc/cpu/kernels_avx2.cpp);
do
  object=$out/$(echo "${source%.cpp}" | tr / -).o
#shellcheck disable = SC2086
  $cxx $flags -O2 -c "$source" -o "$object"
  objects+=("$object")
done
rm -f "$out/shared.a"
ar rcs "$out/shared.a" "${objects[@]}"

echo "== plain"
build plain "-O2" ""
for order in in_order reverse random greedy;
do
echo "$order: $(GUMBEL_EXT_ORDER=$order " $out / plain " | tail -n 1)" done

    echo "== races" build race "-O1"
                                                       "-fsanitize=thread" GUMBEL_EXT_QUICK =
    1 "$out/race" | tail - n 1

                        echo "== ASan + UBSan" build asan
                             "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
                             "" GUMBEL_EXT_QUICK = 1 ASAN_OPTIONS = detect_leaks =
        0 "$out/asan" | tail - n 1
