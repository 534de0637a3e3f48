#!/usr/bin/env bash
# Everything that needs a GPU, once one is at hand, in ten minutes: builds for it, runs the tests on
# it, compute-sanitizer, the benchmarks and the profiler. Needs no network.
#
#   bash benchmarks/gpu_report.sh [--out DIR] [--seconds N] [--only STAGE,...] [--rehearse]
#
#   --out DIR       where bench.json, report.json, log.txt, tables and plots go
#                   (default benchmarks/results/gpu-<name of the GPU>)
#   --seconds N     for all stages together (default 570); a stage that is too slow is cut, so that
#                   the ones after it still run
#   --only STAGES   some of: build tests suite sanitizers bench ncu plots
#   --rehearse      what needs no GPU, in a copy of the tree: does this script itself work?
#
# PYTHON names the interpreter (default python3); it must have torch, and for the tests pytest,
# hypothesis, scipy and mpmath. GUMBEL_EXT_COMMIT names the commit where there is no .git.
# Exit status: 0 where no stage failed; skipped ones have a reason.
set -uo pipefail

# Braces, so that the shell has read all of it before the tree is built and may change.
{
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2

usage() { sed -n '5,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
stop() {
  echo "gpu_report.sh: $1" >&2
  exit 2
}

python=${PYTHON:-python3}
out='' seconds=570 only=all rehearse=false
while [ $# -gt 0 ]; do
  case $1 in
    --out | --seconds | --only)
      [ $# -ge 2 ] || stop "$1 needs a value"
      case $1 in --out) out=$2 ;; --seconds) seconds=$2 ;; --only) only=$2 ;; esac
      shift 2
      ;;
    --rehearse) rehearse=true && shift ;;
    -h | --help) usage && exit 0 ;;
    *) stop "unknown argument $1; see --help" ;;
  esac
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || stop "--seconds must be a positive number, got $seconds"
for stage in ${only//,/ }; do
  [[ " all build tests suite sanitizers bench ncu plots " == *" $stage "* ]] ||
    stop "--only: no stage is named $stage"
done

python=$(command -v "$python") || stop "no Python: set PYTHON"
# ninja and the CUDA tools may lie beside the interpreter and in the toolkit alone.
export PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

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

missing() { # missing MODULE...: those that this Python lacks
  "$python" -c '
import importlib.util, sys
print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])' "$@"
}

# --- stages ---

declare -A outcome detail took
order=()
running=()
started=$SECONDS
left() { echo $((seconds - (SECONDS - started))); }

clean_up() {
  local pid
  # Each stage hands it on to its timeout, which ends all that the stage has started.
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null; done
  wait
  rm -rf "$work"
}
hearing=(env --default-signal=INT)
"${hearing[@]}" true 2>/dev/null || hearing=()
trap clean_up EXIT
trap 'exit 130' INT TERM

wanted() { [ "$only" = all ] || [[ ",$only," == *",$1,"* ]]; }

skip() { # skip NAME REASON
  order+=("$1")
  outcome[$1]=skipped detail[$1]=$2 took[$1]=0
  echo "-- $1: skipped: $2"
}

# start NAME MOST_SECONDS SECONDS_KEPT_FOR_LATER COMMAND...: in the background. What is kept is of the
# 570 seconds of a whole report, and less of fewer.
start() {
  local stage=$1 limit=$2 room=$(($(left) - $3 * seconds / 570))
  shift 3
  if [ "$room" -lt "$limit" ]; then limit=$room; fi
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
    timeout --signal=INT --kill-after=15 "$limit" "${hearing[@]}" "$@" \
      >"$work/$stage.log" 2>&1 </dev/null &
    trap 'kill $!' TERM
    wait $!
    echo "$? $((SECONDS - begin)) $limit" >"$work/$stage.end"
  ) &
}

last_line() { # last_line STAGE PATTERN
  grep -E "$2" "$work/$1.log" | tail -n 1 | tr -d '\r' | sed 's/^=* *//; s/ *=*$//' | cut -c1-110
}

# finish STAGE PATTERN [PATTERN_OF_WHAT_CANNOT_BE_HELPED]: waits; the last line with PATTERN tells
# how it went; the second pattern makes a failure a skipped stage.
finish() {
  local stage=$1 pattern=$2 excuse=${3:-} rc spent limit
  [[ " ${running[*]-} " == *" $stage "* ]] || return 0
  while [ ! -s "$work/$stage.end" ]; do sleep 0.2; done
  read -r rc spent limit <"$work/$stage.end"
  took[$stage]=$spent
  detail[$stage]=$(last_line "$stage" "$pattern")
  if [ "$rc" = 0 ]; then
    outcome[$stage]=ok
  elif [ -n "$excuse" ] && grep -qE "$excuse" "$work/$stage.log"; then
    outcome[$stage]=skipped
    detail[$stage]=$(last_line "$stage" "$excuse")
  else
    outcome[$stage]=FAILED
    case $rc in
      124 | 137) detail[$stage]="cut after $limit s; ${detail[$stage]}" ;;
      *) detail[$stage]="${detail[$stage]:-$(tail -n 1 "$work/$stage.log" | cut -c1-110)} (exit $rc)" ;;
    esac
  fi
  echo "-- $stage: ${outcome[$stage]} after $spent s: ${detail[$stage]}"
}

works() { [ "${outcome[$1]-ok}" = ok ]; }

echo "gumbel_ext on ${gpu:-no GPU}, torch $torch_version, $("$python" --version), to $out"

# --- build ---

if $rehearse; then
  # Objects and the module of the tree itself stay as they are.
  tree=$work/tree
  mkdir "$tree"
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ -f "$file" ] && printf '%s\0' "$file"; done |
    xargs -0 cp --parents -t "$tree" || stop "cannot copy the tree"
  cd "$tree" || exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

jobs_at_once=$(nproc)
if wanted build; then
  if [ -n "$(missing setuptools)" ]; then
    skip build "setuptools is missing"
  else
    [ -n "$(command -v ninja)" ] || echo '-- build: ninja is missing: one compiler at a time'
    start build $($rehearse && echo 600 || echo 240) 260 env FORCE_CUDA=$($rehearse && echo 0 || echo 1) \
      TORCH_CUDA_ARCH_LIST="$capability" MAX_JOBS="${MAX_JOBS:-$jobs_at_once}" \
      "$python" setup.py build_ext --inplace
    finish build '^(copying|gumbel_ext:|ninja: |.*[Ee]rror)'
  fi
fi

# --- tests, and the sanitizers beside them: they wait for the host more than for the GPU ---

# pytest's own -n spreads tests over processes, which share the GPU.
in_processes() { # in_processes COUNT
  if [ "$1" -gt 1 ] && [ -z "$(missing xdist)" ]; then echo "-n $1"; fi
}
lacking=$(missing pytest hypothesis scipy mpmath numpy)
pytest=("$python" -m pytest -q -ra --tb=short -p no:cacheprovider)
later=155
test_reason=''
if [ -n "$lacking" ]; then test_reason="not installed: $lacking"; fi
if ! works build; then test_reason="the build is ${outcome[build]}"; fi
device=$($rehearse && echo cpu || echo cuda)
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4

if wanted tests; then
  if [ -n "$test_reason" ]; then
    skip tests "$test_reason"
  else
    # shellcheck disable=SC2046
    start tests 200 $later "${pytest[@]}" $(in_processes $((jobs_at_once / 4))) \
      --device $device tests/test_cuda.py
  fi
fi
if wanted suite; then
  if [ -n "$test_reason" ]; then
    skip suite "$test_reason"
  elif $rehearse; then
    start suite 200 $later "${pytest[@]}" --device cpu tests/test_errors.py tests/test_philox.py
  else
    # shellcheck disable=SC2046
    start suite 240 $later "${pytest[@]}" $(in_processes $((jobs_at_once / 2))) \
      --device cuda tests --ignore tests/test_cuda.py
  fi
fi
checks=(memcheck racecheck initcheck synccheck)
if wanted sanitizers; then
  for check in "${checks[@]}"; do
    if $rehearse; then
      skip "$check" 'needs a GPU; this is a rehearsal'
    elif [ -n "$test_reason" ]; then
      skip "$check" "$test_reason"
    elif ! command -v compute-sanitizer >"$work/which"; then
      skip "$check" 'compute-sanitizer is not installed'
    else
      # Each tensor gets an allocation of its own, past the end of which nothing may be touched.
      start "$check" 200 $later env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$check" --kernel-name kns=gumbel_ext --error-exitcode 86 \
        --print-limit 20 "${pytest[@]}" --device cuda -m sanitizer tests/test_cuda.py
    fi
  done
fi
counts='(passed|failed|error|skipped|no tests ran).* in [0-9.]+'
finish tests "$counts"
finish suite "$counts"
for check in "${checks[@]}"; do
  finish "$check" 'ERROR SUMMARY|RACECHECK SUMMARY' 'Device not supported|LibraryNotLoaded'
done

# --- speed: alone on the GPU ---

unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS
if wanted bench; then
  if ! works build; then
    skip bench "the build is ${outcome[build]}"
  elif $rehearse; then
    start bench 60 60 "$python" benchmarks/bench_cuda.py --dry-run
  else
    room=$(($(left) - 55 * seconds / 570))
    if [ "$room" -gt 200 ]; then room=200; fi
    # It stops by itself while it can still write all it has; cases are in order of weight.
    start bench 200 55 "$python" benchmarks/bench_cuda.py \
      --seconds $((room > 40 ? room - 20 : (room + 1) / 2)) --output "$out/bench.json"
  fi
  finish bench '^(wrote|bench_cuda.py:)|/dim='
fi

# --- what limits the kernels ---

cat >"$work/profiled.py" <<'END'
import torch
import gumbel_ext

for shape in ((16384, 1024), (1024, 65536)):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        grad = torch.randn_like(logits)
        for hard in (False, True):
            y = gumbel_ext.gumbel_softmax(logits, 0.5, hard)
            torch.autograd.grad(y, logits, grad)
        gumbel_ext.gumbel_argmax(logits.detach())
torch.cuda.synchronize()
END
cat >"$work/limits.py" <<'END'
"""One line a kernel, from what ncu wrote: its time and the busiest units."""
import csv, re, sys
def short(name):
    name = re.sub(r"gumbel_ext::|cuda_device::|\((un)?(signed )?(int|char)\)", "", name)
    return name.split("(")[0].removeprefix("void ")


lines = [line for line in open(sys.argv[1], encoding="utf-8") if line.startswith('"')]
wanted = ("Duration", "DRAM Throughput", "L2 Cache Throughput", "Compute (SM) Throughput",
          "Registers Per Thread", "Achieved Occupancy")
kernels = {}
for row in csv.DictReader(lines):
    if row.get("Metric Name") in wanted:
        key = row["ID"], short(row["Kernel Name"])
        value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
        kernels.setdefault(key, {})[row["Metric Name"]] = value
for (_, name), found in kernels.items():
    print(f"{name[:58]:58} " + ", ".join(f"{k} {found[k]}" for k in wanted if k in found))
END
if wanted ncu; then
  if $rehearse; then
    skip ncu 'needs a GPU; this is a rehearsal'
  elif ! works build; then
    skip ncu "the build is ${outcome[build]}"
  elif ! command -v ncu >"$work/which"; then
    skip ncu 'ncu is not installed'
  else
    # The clocks stay as they are: they are not this script's to set.
    start ncu 75 20 ncu --clock-control none --kernel-name-base demangled \
      --kernel-name regex:gumbel_ext --csv --page details --section SpeedOfLight \
      --section LaunchStats --section Occupancy --section ComputeWorkloadAnalysis \
      "$python" "$work/profiled.py"
    finish ncu '==ERROR==|==PROF== Disconnected' 'ERR_NVGPUCTRPERM|LibraryNotLoaded'
    if works ncu; then
      cp "$work/ncu.log" "$out/ncu.csv"
      "$python" "$work/limits.py" "$out/ncu.csv" >"$work/limits.txt" 2>&1
    fi
  fi
fi

# --- tables and plots ---

if wanted plots; then
  if [ -n "$(missing matplotlib)" ]; then
    skip plots 'matplotlib is not installed'
  elif $rehearse; then
    start plots 60 0 "$python" benchmarks/plot.py --docs "$out"
  elif [ ! -s "$out/bench.json" ]; then
    skip plots 'there is no bench.json'
  else
    start plots 60 0 "$python" benchmarks/plot.py "$out/bench.json" --docs "$out"
  fi
  finish plots '^plot.py:|Error'
  rm -f "$out"/*.partial
fi

# --- what is left behind ---

for stage in "${order[@]}"; do
  if [ -f "$work/$stage.log" ]; then
    printf '\n===== %s: %s\n\n' "$stage" "${outcome[$stage]}"
    tail -c 1500000 "$work/$stage.log"
  fi
done >"$out/log.txt"

for stage in "${order[@]}"; do
  printf '%s\t%s\t%s\t%s\n' "$stage" "${outcome[$stage]}" "${took[$stage]}" "${detail[$stage]}"
done >"$work/stages.tsv"
"$python" - "$work/stages.tsv" "$out/report.json" "$gpu" "$torch_version" \
  "$(git -C "$root" rev-parse HEAD 2>/dev/null || echo "${GUMBEL_EXT_COMMIT-}")" $((SECONDS - started)) <<'END'
import json, sys
stages, target, gpu, torch, commit, spent = sys.argv[1:]
names = ("stage", "outcome", "seconds", "detail")
rows = [dict(zip(names, line.rstrip("\n").split("\t"))) for line in open(stages)]
report = {"gpu": gpu or None, "torch": torch, "commit": commit or None, "seconds": int(spent)}
report["stages"] = [{**row, "seconds": int(row["seconds"])} for row in rows]
with open(target, "w") as file:
    json.dump(report, file, indent=2)
    file.write("\n")
END

failures=0
{
  echo
  echo "gumbel_ext on ${gpu:-no GPU (a rehearsal)}, torch $torch_version: $((SECONDS - started)) s"
  echo
  for stage in "${order[@]}"; do
    printf '%-10s %-8s %4s s  %s\n' "$stage" "${outcome[$stage]}" "${took[$stage]}" \
      "${detail[$stage]}"
  done
  for stage in tests suite; do
    if [ -f "$work/$stage.log" ] && grep -qE '^(FAILED|ERROR) ' "$work/$stage.log"; then
      printf '\n%s:\n' "$stage"
      grep -E '^(FAILED|ERROR) ' "$work/$stage.log" | cut -c1-160 | head -n 12
    fi
  done
  if [ -s "$work/limits.txt" ]; then
    printf '\nncu:\n'
    head -n 24 "$work/limits.txt" | cut -c1-220
  fi
  if [ "${outcome[plots]-}" = ok ] && ! $rehearse; then
    printf '\nagainst the targets (all of it in benchmarks.md):\n'
    grep -E '^\| (op |[a-z ]*\| (float32|bfloat16) )' "$work/plots.log" | head -n 32
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
