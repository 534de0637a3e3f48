#!/usr/bin/env bash
# Everything that needs a GPU, once one is at hand, in ten minutes: builds for it, runs the tests on
# it, compute-sanitizer, the benchmarks and the profiler. Needs no network.
#
#   bash benchmarks/gpu_report.sh [--out DIR] [--seconds N] [--only STAGE,...] [--prebuilt DIR]
#                                 [--rehearse]
#
#   --out DIR       where the results go, eight files at most: report.json, summary.txt, log.txt,
#                   bench.json, family.json, gpu-speed.png, gpu-memory.png, rest.tar.gz
#                   (default benchmarks/results/gpu-<name of the GPU>)
#   --seconds N     for all stages together (default 570, of a rehearsal 1140), shared out by the plan
#                   that is printed first; a stage that is too slow is cut: those after it still run
#   --only STAGES   some of: build tests suite kernels sanitizers bench family ncu plots. All of them
#                   fit one run; two have time to spare: build,tests,suite,kernels,sanitizers, then
#                   build,bench,family,ncu,plots
#   --prebuilt DIR  takes _C*.so and _built_for.json from DIR in place of building
#   --rehearse      without a GPU, on the CUDA kernels emulated: does this script itself work?
#
# PYTHON names the interpreter (default python3); it must have torch, and for the tests pytest,
# hypothesis, scipy and mpmath. GUMBEL_EXT_COMMIT names the commit where there is no .git,
# GUMBEL_EXT_EMULATED_CUDA the emulated kernels for a rehearsal if they are built.
# Exit status: 0 where no stage failed; skipped ones have a reason. A sanitizer that was cut without
# having found anything has not failed; how far it came is said.
set -uo pipefail

# Braces, so that the shell has read all of it before the tree is built and may change.
{
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2

usage() { sed -n '5,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
stop() {
  echo "gpu_report.sh: $1" >&2
  exit 2
}

python=${PYTHON:-python3}
stages=(build tests suite kernels sanitizers bench family ncu plots)
out='' seconds='' only=all prebuilt='' rehearse=false
while [ $# -gt 0 ]; do
  case $1 in
    --out | --seconds | --only | --prebuilt)
      [ $# -ge 2 ] || stop "$1 needs a value"
      case $1 in
        --out) out=$2 ;;
        --seconds) seconds=$2 ;;
        --only) only=$2 ;;
        --prebuilt) prebuilt=$2 ;;
      esac
      shift 2
      ;;
    --rehearse) rehearse=true && shift ;;
    -h | --help) usage && exit 0 ;;
    *) stop "unknown argument $1; see --help" ;;
  esac
done
: "${seconds:=$($rehearse && echo 1140 || echo 570)}"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || stop "--seconds must be a positive number, got $seconds"
for stage in ${only//,/ }; do
  [[ " all ${stages[*]} " == *" $stage "* ]] || stop "--only: no stage is named $stage"
done
if [ -n "$prebuilt" ]; then
  prebuilt=$(cd "$prebuilt" 2>/dev/null && pwd) || stop "--prebuilt: there is no such folder"
  compgen -G "$prebuilt/_C*.so" >/dev/null || stop "--prebuilt: there is no _C*.so in $prebuilt"
fi

python=$(command -v "$python") || stop "no Python: set PYTHON"
# ninja and the CUDA tools may lie beside the interpreter and in the toolkit alone.
export PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# --- what is there ---

facts=$("$python" - <<'END'
import torch
print(torch.__version__)
gpu = torch.cuda.is_available()
print(torch.cuda.get_device_name(0) if gpu else "")
print("%d.%d" % torch.cuda.get_device_capability(0) if gpu else "")
END
) || stop "$python cannot import torch"
{
  read -r torch_version
  read -r gpu
  read -r capability
} <<<"$facts"
if [ -z "$gpu" ] && ! $rehearse; then
  stop "torch $torch_version sees no GPU; --rehearse runs what needs none"
fi
if $rehearse; then gpu='' capability=''; fi

name=$(echo "${gpu:-rehearsal}" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' - | sed 's/-*$//')
case $name in rehearsal) default=${TMPDIR:-/tmp}/gumbel_ext-gpu-rehearsal ;; *) default=$root/benchmarks/results/gpu-$name ;; esac
mkdir -p "${out:=$default}" || stop "cannot write to $out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
mkdir "$work/rest"

missing() { # missing MODULE...: those that this Python lacks
  "$python" -c '
import importlib.util, sys
print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])' "$@"
}

# --- time ---

declare -A outcome detail took
order=()
running=()
started=$SECONDS
left() { echo $((seconds - (SECONDS - started))); }
wanted() { [ "$only" = all ] || [[ ",$only," == *",$1,"* ]]; }

# The parts of a run that follow each other; tests, suite, kernels and sanitizers are one, beside each
# other. Shares of the time, of which a part gets those of the parts that are still to come.
parts=(build checks bench family ncu plots)
declare -A share=([build]=120 [checks]=200 [bench]=110 [family]=60 [ncu]=50 [plots]=20)
declare -A most=([build]=400 [checks]=420 [bench]=420 [family]=260 [ncu]=180 [plots]=60)
in_run() { # in_run PART
  if [ "$1" != checks ]; then
    wanted "$1"
  else
    wanted tests || wanted suite || wanted kernels || wanted sanitizers
  fi
}
room_of() { # room_of PART: the seconds that it may take, from what is left
  local part sum=0 due=false room
  for part in "${parts[@]}"; do
    [ "$part" = "$1" ] && due=true
    if $due && in_run "$part"; then sum=$((sum + share[$part])); fi
  done
  room=$(($(left) * share[$1] / (sum > 0 ? sum : 1)))
  # Nothing runs without the build: it may take twice its share from the others.
  if [ "$1" = build ]; then room=$((2 * room)); fi
  if [ "$room" -gt $(($(left) - 5)) ]; then room=$(($(left) - 5)); fi
  echo $((room < most[$1] ? room : most[$1]))
}
print_plan() {
  local part sum=0 line='plan:'
  for part in "${parts[@]}"; do in_run "$part" && sum=$((sum + share[$part])); done
  for part in "${parts[@]}"; do
    in_run "$part" || continue
    part_seconds=$((seconds * share[$part] / sum))
    line+=" $part $((part_seconds < most[$part] ? part_seconds : most[$part])) s,"
  done
  echo "${line%,}; in all $seconds s; what a part leaves the next ones have"
}

# --- stages ---

record() { # writes report.json as things stand
  local stage
  for stage in "${order[@]}"; do
    printf '%s\t%s\t%s\t%s\n' "$stage" "${outcome[$stage]-running}" "${took[$stage]-0}" \
      "${detail[$stage]-}"
  done >"$work/stages.tsv"
  printf '{"rehearsal": %s, "ended": %s, "commit": "%s", "seconds": %s}' \
    "$rehearse" "${ended-false}" "$commit" $((SECONDS - started)) >"$work/about.json"
  "$python" "$root/benchmarks/gpu_report.py" write "$work" "$out/report.json"
}

clean_up() {
  local pid stage
  trap '' INT TERM
  # Each stage hands it on to its timeout, which ends all that the stage has started.
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null; done
  wait
  if [ "${ended-false}" = false ] && [ -n "${commit+set}" ]; then
    for stage in "${order[@]}"; do
      if [ -z "${outcome[$stage]-}" ]; then
        outcome[$stage]=FAILED detail[$stage]='the run was interrupted' took[$stage]=0
      fi
    done
    record
    write_logs
  fi
  rm -rf "$work"
}
hearing=(env --default-signal=INT)
"${hearing[@]}" true 2>/dev/null || hearing=()
trap clean_up EXIT
trap 'exit 130' INT TERM

skip() { # skip NAME REASON
  order+=("$1")
  outcome[$1]=skipped detail[$1]=$2 took[$1]=0
  echo "-- $1: skipped: $2"
}

# start NAME SECONDS COMMAND...: in the background.
start() {
  local stage=$1 limit=$2
  shift 2
  if [ "$limit" -lt 5 ]; then
    skip "$stage" 'no time was left'
    return
  fi
  order+=("$stage")
  running+=("$stage")
  echo "-- $stage: at most $limit s"
  (
    begin=$SECONDS
    # On an interrupt Python ends with what it has, what does not end is killed. A shell makes its
    # background jobs deaf to interrupts, which env undoes.
    timeout --signal=INT --kill-after=10 "$limit" "${hearing[@]}" "$@" \
      >"$work/$stage.log" 2>&1 </dev/null &
    trap 'kill $!' TERM
    wait $!
    echo "$? $((SECONDS - begin)) $limit" >"$work/$stage.end"
  ) &
}

last_line() { # last_line STAGE PATTERN
  grep -aE "$2" "$work/$1.log" | tail -n 1 | tr -d '\r' | tr '\t' ' ' | sed 's/^=* *//; s/ *=*$//' |
    cut -c1-110
}

# finish STAGE PATTERN [EXCUSE [UNHARMED]]: waits; the last line with PATTERN tells how it went. A
# failure with EXCUSE is a skipped stage; one that was cut with UNHARMED has only not come to its end.
finish() {
  local stage=$1 pattern=$2 excuse=${3:-} unharmed=${4:-} rc spent limit
  [[ " ${running[*]-} " == *" $stage "* ]] || return 0
  while [ ! -s "$work/$stage.end" ]; do sleep 0.2; done
  read -r rc spent limit <"$work/$stage.end"
  took[$stage]=$spent
  detail[$stage]=$(last_line "$stage" "$pattern")
  if [ "$rc" = 0 ]; then
    outcome[$stage]=ok
  elif [ -n "$excuse" ] && grep -qaE "$excuse" "$work/$stage.log"; then
    outcome[$stage]=skipped
    detail[$stage]=$(last_line "$stage" "$excuse")
  elif [ "$rc" = 124 ] || [ "$rc" = 137 ]; then
    outcome[$stage]=FAILED
    if [ -n "$unharmed" ] && grep -qaE "$unharmed" "$work/$stage.log" &&
      ! grep -qaE '^(FAILED|ERROR) |[1-9][0-9]* failed' "$work/$stage.log"; then
      outcome[$stage]=cut
    fi
    detail[$stage]="cut after $limit s; ${detail[$stage]}"
  else
    outcome[$stage]=FAILED
    detail[$stage]="${detail[$stage]:-$(last_line "$stage" '[^ ]')} (exit $rc)"
  fi
  echo "-- $stage: ${outcome[$stage]} after $spent s: ${detail[$stage]}"
  record
}

works() { [ "${outcome[$1]-ok}" = ok ]; }

write_logs() {
  local stage
  for stage in "${order[@]}"; do
    if [ -f "$work/$stage.log" ]; then
      printf '\n===== %s: %s\n\n' "$stage" "${outcome[$stage]}"
      tail -c 1500000 "$work/$stage.log"
    fi
  done >"$out/log.txt"
}

commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo "${GUMBEL_EXT_COMMIT-}")
echo "gumbel_ext on ${gpu:-no GPU}, torch $torch_version, $("$python" --version), to $out"
print_plan
"$python" benchmarks/gpu_report.py device "$work/device-before.json"
record

# --- build ---

emulated=tests/cuda/emulated/build.py
if wanted build; then
  if $rehearse; then
    # The module is the tree's own, as rehearsing it is not worth minutes; the kernels are built.
    start build "$(room_of build)" "$python" -c '
import os, runpy, sys
from gumbel_ext import _C
print("gumbel_ext:", _C.build_info())
sys.argv = sys.argv[1:]
built = os.environ.get("GUMBEL_EXT_EMULATED_CUDA")
print(built) if built else runpy.run_path(sys.argv[0], run_name="__main__")' "$emulated"
    finish build '^/.*\.so$|[Ee]rror'
    if works build; then
      GUMBEL_EXT_EMULATED_CUDA=$(grep -aE '^/.*\.so$' "$work/build.log" | tail -n 1)
      export GUMBEL_EXT_EMULATED_CUDA
    fi
  elif [ -n "$prebuilt" ]; then
    start build 60 bash -c '
      cp "$1"/_C*.so "$1"/_built_for.json gumbel_ext/ &&
        "$2" -c "from gumbel_ext import _C; print(\"prebuilt:\", _C.build_info())"' \
      bash "$prebuilt" "$python"
    finish build '^prebuilt:|[Ee]rror'
  elif [ -n "$(missing setuptools)" ]; then
    skip build 'setuptools is missing'
  else
    [ -n "$(command -v ninja)" ] || echo '-- build: ninja is missing: one compiler at a time'
    start build "$(room_of build)" env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
      MAX_JOBS="${MAX_JOBS:-$(nproc)}" "$python" setup.py build_ext --inplace
    finish build '^(copying|gumbel_ext:|ninja: |.*[Ee]rror)'
  fi
fi

"$python" benchmarks/gpu_report.py build "$work/build.json"

# --- tests, and the sanitizers beside them: they wait for the host more than for the GPU ---

# pytest's own -n spreads tests over processes, which share the GPU.
in_processes() { # in_processes COUNT
  if [ "$1" -gt 1 ] && [ -z "$(missing xdist)" ]; then echo "-n $1"; fi
}
lacking=$(missing pytest hypothesis scipy mpmath numpy)
pytest=("$python" -m pytest -q -ra --tb=short -p no:cacheprovider)
reason=''
if [ -n "$lacking" ]; then reason="not installed: $lacking"; fi
if ! works build; then reason="the build is ${outcome[build]}"; fi
device=$($rehearse && echo emulated || echo cuda)
checks_room=$(room_of checks)
cores=$(nproc)
of_cuda=(tests/test_cuda*.py)
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4

run_tests() { # run_tests STAGE PROCESSES ARGUMENT...
  local stage=$1 processes=$2
  shift 2
  if [ -n "$reason" ]; then
    skip "$stage" "$reason"
  else
    # shellcheck disable=SC2046
    start "$stage" "$checks_room" "${pytest[@]}" $(in_processes "$processes") --device "$device" \
      --junitxml="$work/$stage.xml" "$@"
  fi
}
if wanted tests; then
  if $rehearse; then
    run_tests tests 1 "${of_cuda[@]}"
  else
    run_tests tests $((cores / 4)) "${of_cuda[@]}"
  fi
fi
if wanted suite; then
  if $rehearse; then
    run_tests suite 1 tests/test_errors.py tests/test_edges.py
  else
    run_tests suite $((cores / 2)) tests "${of_cuda[@]/#/--ignore=}"
  fi
fi
if wanted kernels && $rehearse; then
  skip kernels "only CUDA's profiler knows what was launched"
elif wanted kernels; then
  PYTHONPATH=$root/tests:$PYTHONPATH run_tests kernels 1 -p launched_kernels -m sanitizer \
    "${of_cuda[@]}"
fi

# Two processes a tool, of about as many kernels each. Vectors of bfloat16 are those of float16; where
# operands lie says nothing about threads that race or meet.
tools=(memcheck racecheck initcheck synccheck)
halves=("tests/test_cuda.py tests/test_cuda_positions.py tests/test_cuda_topk.py")
halves+=("$(for file in "${of_cuda[@]}"; do [[ " ${halves[0]} " == *" $file "* ]] || echo "$file"; done)")
sanitizers=()
if wanted sanitizers; then
  for tool in "${tools[@]}"; do
    for half in 0 1; do
      stage=$tool-$((half + 1))
      sanitizers+=("$stage")
      case $tool in
        racecheck | synccheck) which='not bfloat16 and not unaligned' ;;
        *) which='not bfloat16' ;;
      esac
      if $rehearse; then
        skip "$stage" 'make cuda-check runs the kernels under ASan, UBSan and a race detector'
      elif [ -n "$reason" ]; then
        skip "$stage" "$reason"
      elif ! command -v compute-sanitizer >"$work/which"; then
        skip "$stage" 'compute-sanitizer is not installed'
      else
        # Each tensor gets an allocation of its own, past the end of which nothing may be touched.
        # initcheck must see what PyTorch's kernels write, and may find fault with them: only reads by
        # this package's count. The others need not look at PyTorch's.
        sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool")
        case $tool in
          initcheck) sanitize+=(--show-backtrace no --print-limit 10000) ;;
          memcheck) sanitize+=(--report-api-errors no) ;;&
          *) sanitize+=(--kernel-name kns=gumbel_ext --error-exitcode 86 --print-limit 20) ;;
        esac
        # shellcheck disable=SC2086
        start "$stage" "$checks_room" bash -c '
          trap : INT
          seen=$1 && shift
          "$@" 2>&1 | tee -i "$seen"
          status=${PIPESTATUS[0]}
          own=$(grep -acE "^========= +at .*gumbel_ext" "$seen")
          echo "$own errors in kernels of gumbel_ext; $(grep -aE "(ERROR|RACECHECK) SUMMARY" "$seen")"
          if [ "$own" -gt 0 ]; then exit 86; fi
          exit "$status"' bash "$work/$stage.seen" "${sanitize[@]}" \
          "${pytest[@]}" --device cuda -m sanitizer -k "$which" ${halves[half]}
      fi
    done
  done
fi
counts='(passed|failed|error|skipped|no tests ran).* in [0-9.]+'
finish tests "$counts"
finish suite "$counts"
finish kernels '^launched [0-9]+ of|[Ee]rror'
for stage in "${sanitizers[@]}"; do
  finish "$stage" '^[0-9]+ errors in kernels of' 'Device not supported|LibraryNotLoaded' \
    '^0 errors in kernels of'
  if [ "${outcome[$stage]-}" = cut ]; then
    detail[$stage]="${detail[$stage]}, $(last_line "$stage" "$counts")"
  fi
done

# --- speed: alone on the GPU ---

unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS

# measure STAGE SCRIPT FILE: the script stops by itself while it can still write all it has.
measure() {
  local stage=$1 script=$2 file=$3 room
  wanted "$stage" || return 0
  room=$(room_of "$stage")
  if ! works build; then
    skip "$stage" "the build is ${outcome[build]}"
  elif [ ! -f "$script" ]; then
    skip "$stage" "there is no $script"
  elif $rehearse; then
    start "$stage" "$room" "$python" "$script" --rehearse \
      --seconds $((room > 60 ? 40 : room / 2)) --output "$out/$file"
  else
    start "$stage" "$room" "$python" "$script" \
      --seconds $((room > 40 ? room - 20 : (room + 1) / 2)) --output "$out/$file"
  fi
  finish "$stage" '^(wrote|bench[a-z_]*.py:)|/dim='
}
prefix=$($rehearse && echo rehearsal- || echo '')
measure bench benchmarks/bench_cuda.py "${prefix}bench.json"
measure family benchmarks/bench_family_cuda.py "${prefix}family.json"
"$python" benchmarks/gpu_report.py device "$work/device-after.json"

# --- what limits the kernels ---

if wanted ncu; then
  if $rehearse; then
    skip ncu 'needs a GPU; this is a rehearsal'
  elif ! works build; then
    skip ncu "the build is ${outcome[build]}"
  elif ! command -v ncu >"$work/which"; then
    skip ncu 'ncu is not installed'
  else
    # The clocks stay as they are: they are not this script's to set.
    start ncu "$(room_of ncu)" ncu --clock-control none --kernel-name-base demangled \
      --kernel-name regex:gumbel_ext --csv --page details --section SpeedOfLight \
      --section LaunchStats --section Occupancy --section ComputeWorkloadAnalysis \
      "$python" benchmarks/gpu_profile.py
    finish ncu '==ERROR==|==PROF== Disconnected' 'ERR_NVGPUCTRPERM|LibraryNotLoaded'
    if [ -s "$work/ncu.log" ] && [ "${outcome[ncu]}" != skipped ]; then
      cp "$work/ncu.log" "$work/rest/ncu.csv"
      "$python" benchmarks/gpu_profile.py --table "$work/rest/ncu.csv" >"$work/limits.txt" 2>&1
    fi
  fi
fi

# --- tables and plots ---

if wanted plots; then
  bench=$out/${prefix}bench.json family=$out/${prefix}family.json
  if [ ! -s "$bench" ] && [ ! -s "$family" ]; then
    skip plots 'nothing was measured'
  else
    start plots "$(room_of plots)" bash -c '
      python=$1 bench=$2 family=$3 pages=$4 status=0
      if [ -s "$bench" ]; then
        if "$python" -c "import matplotlib" 2>/dev/null; then
          "$python" benchmarks/plot.py "$bench" --docs "$pages" || status=1
        else
          echo "matplotlib is not installed: no pictures"
        fi
      fi
      if [ -s "$family" ]; then
        "$python" benchmarks/family_tables.py "$family" --page "$pages/family.md" || status=1
      fi
      exit $status' bash "$python" "$bench" "$family" "$work/rest"
    finish plots '^(plot|family_tables).py:|^wrote|matplotlib|Error'
    for picture in "$work"/rest/*.png; do
      if [ -f "$picture" ]; then mv "$picture" "$out/"; fi
    done
  fi
fi
rm -f "$out"/*.partial

# --- what is left behind ---

ended=true
record
write_logs
cp "$work"/*.xml "$work"/*.log "$work/rest/" 2>/dev/null
tar -czf "$out/rest.tar.gz" -C "$work/rest" . || echo "cannot write $out/rest.tar.gz"

failures=0
{
  echo
  echo "gumbel_ext on ${gpu:-no GPU (a rehearsal)}, torch $torch_version: $((SECONDS - started)) s"
  echo
  for stage in "${order[@]}"; do
    printf '%-11s %-8s %4s s  %s\n' "$stage" "${outcome[$stage]}" "${took[$stage]}" \
      "${detail[$stage]}"
  done
  for stage in tests suite kernels; do
    if [ -f "$work/$stage.log" ] && grep -qaE '^(FAILED|ERROR) ' "$work/$stage.log"; then
      printf '\n%s:\n' "$stage"
      grep -aE '^(FAILED|ERROR) ' "$work/$stage.log" | cut -c1-160 | head -n 12
    fi
  done
  "$python" - "$out/report.json" <<'END'
import json, sys
report = json.load(open(sys.argv[1]))
if report["near_ties"]:
    ties = report["near_ties"]
    print(f"\nchoices that differ from the CPU's: {ties['differ']} of {ties['choices']}")
for suite, found in report["tests"].items():
    if found.get("skipped"):
        print(f"\n{suite}, skipped:")
        for entry in found["skipped"][:12]:
            print(f"  {entry['tests']:5} {entry['reason'][:100]}")
END
  if [ -s "$work/limits.txt" ]; then
    printf '\nncu:\n'
    head -n 60 "$work/limits.txt" | cut -c1-220
  fi
  if [ "${outcome[plots]-}" = ok ] && ! $rehearse; then
    printf '\nagainst the targets (all of it in benchmarks.md of rest.tar.gz):\n'
    grep -aE '^\| (op |[a-z ]*\| (float32|bfloat16) )' "$work/plots.log" | head -n 32
  fi
  echo
  echo "everything is in $out"
} | tee "$out/summary.txt"
for stage in "${order[@]}"; do
  if [ "${outcome[$stage]}" = FAILED ]; then failures=$((failures + 1)); fi
done
if [ $failures -gt 0 ]; then
  echo "$failures of ${#order[@]} stages failed" | tee -a "$out/summary.txt"
  exit 1
fi
exit 0
}
