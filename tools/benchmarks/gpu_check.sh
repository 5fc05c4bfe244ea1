#!/usr/bin/env bash
# Build the operators for the GPU of this machine, test ContMix there and measure it, in less than 8 minutes.
#
#   bash tools/benchmarks/gpu_check.sh [--out DIR] [--device cuda|cpu] [--prebuilt] [--tiny]
#
#   --out DIR       folder for results and logs; default: $OUT or ./gpu_check_out
#   --device cpu    the same on the CPU, to try this script
#   --prebuilt      use the binary in the checkout
#   --tiny          the smallest measurements, to try this script
#
# It needs torch, setuptools, pytest and, for a GPU, a CUDA toolkit (nvcc) that fits torch. It needs neither OpenMMLab nor a
# network. PYTHON names the interpreter (python3). The build runs on a copy of the sources, in a temporary folder.
# TOTAL_SECONDS (470) limits the whole run. A part that is too slow is stopped and reported, and the next part runs.
# The exit status is 0 if all parts passed, 1 if one failed, 2 if the script could not start.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-gpu_check_out}
device=cuda prebuilt=0 tiny=0

stop() {
    echo "gpu_check: $*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --out | --device)
            (($# > 1)) || stop "$1 needs a value"
            if [[ $1 == --out ]]; then out=$2; else device=$2; fi
            shift
            ;;
        --prebuilt) prebuilt=1 ;;
        --tiny) tiny=1 ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) stop "unknown option $1 (see --help)" ;;
    esac
    shift
done
[[ $device == cuda || $device == cpu ]] || stop "--device must be cuda or cpu, got $device"

python=$(command -v "$python") || stop "there is no ${PYTHON:-python3}; PYTHON names the interpreter"
# The link is not resolved: the interpreter of a virtual environment is a link.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
"$python" -c 'import torch' 2>/dev/null || stop "$python has no torch; PYTHON names another interpreter"
if [[ $device == cuda ]]; then
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability()) if torch.cuda.is_available() else 0')
    [[ $arch == *.* ]] || stop "torch sees no GPU on this machine (--device cpu tries this script without one)"
else
    arch=
    export CUDA_VISIBLE_DEVICES=
fi

mkdir -p "$out" || stop "cannot make $out"
out=$(cd "$out" && pwd)
work=$(mktemp -d) || stop "cannot make a temporary folder"
trap 'rm -rf "$work"' EXIT
deadline=$((SECONDS + ${TOTAL_SECONDS:-470}))
summary=$out/summary.txt
: >"$summary"
failed=0

note() { echo "$*" | tee -a "$summary"; }

# part NAME SECONDS LOG COMMAND...: run a command with its output in LOG, and note the result.
part() {
    local name=$1 limit=$2 log=$out/$3 left=$((deadline - SECONDS)) begin=$SECONDS code=0 end
    shift 3
    if ((left < 10)); then
        failed=1
        note "$(printf '%-10s NOT RUN: no time left' "$name")"
        return 1
    fi
    ((limit > left)) && limit=$left
    printf '\n$ %s\n' "$*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || code=$?
    end="$((SECONDS - begin)) s"
    case $code in
        0) note "$(printf '%-10s ok, %s' "$name" "$end")" ;;
        124 | 137) note "$(printf '%-10s FAILED: stopped after %s' "$name" "$end")" ;;
        *) note "$(printf '%-10s FAILED with %d, %s: see %s' "$name" "$code" "$end" "$log")" ;;
    esac
    if ((code)); then
        failed=1
        tail -n 12 "$log" | cut -c1-300 | sed 's/^/    /'
    fi
    return "$code"
}

rm -f "$out"/{build,bench,tests,sanitizer}.log "$out"/{bench,compiled}.json

# ---- build, in a copy
source=$work/source
mkdir "$source"
exclude=(--exclude=__pycache__)
((prebuilt)) || exclude+=('--exclude=*.so')
tar -C "$root" "${exclude[@]}" -cf - setup.py pyproject.toml README.md overlock_mm | tar -C "$source" -xf - ||
    stop "cannot copy the sources from $root"
export PYTHONPATH=$source${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if ((!prebuilt)); then
    export MAX_JOBS=${MAX_JOBS:-$(nproc)}
    if [[ $device == cuda ]]; then
        export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch
    else
        export FORCE_CUDA=0
    fi
    # A build in place needs setuptools alone, and no certain pip or wheel.
    part build 220 build.log bash -c 'cd "$1" && "$2" setup.py build_ext --inplace' - "$source" "$python"
fi

# From here on nothing runs in the checkout, so that Python imports the copy.
cd "$work" || exit 2
"$python" -W ignore -m overlock_mm.ops 2>&1 | tee -a "$summary"

part small_case 40 tests.log "$python" -W ignore "$here/bench_contmix.py" --check --device "$device"

# ---- the numbers: first the shapes that detectors train with, then the others as time allows
settings=(--arch t b s xt --size 800x1344 512x512 224x224 --batch 2 1 16 --dtype float32 bfloat16 --seconds 0.5)
compiled=(--arch t --size 800x1344 --batch 2 --dtype float32 bfloat16 --seconds 0.5 --implementations ours compiled)
((tiny)) && settings=(--arch t --size 224x224 --stage 4 --implementations ours reference --rounds 3)
part bench 125 bench.log "$python" -W ignore "$here/bench_contmix.py" --device "$device" "${settings[@]}" \
    --json "$out/bench.json" --time-limit 85
((tiny)) || part compiled 80 bench.log "$python" -W ignore "$here/bench_contmix.py" --device "$device" "${compiled[@]}" \
    --json "$out/compiled.json" --time-limit 30

# ---- the tests that need a GPU, without the emulation of CUDA on the CPU
select='not emulat'
[[ $device == cuda ]] && select='(cuda or gpu) and not emulat'
tests=("$root/tests/test_ops" -q --maxfail=20 -p no:cacheprovider -k "$select")
((tiny)) && tests+=(--collect-only)
part tests 120 tests.log "$python" -m pytest "${tests[@]}"

if [[ $device == cuda ]]; then
    sanitizer=$(command -v compute-sanitizer || true)
    [[ -z $sanitizer && -x ${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer ]] &&
        sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
    for tool in memcheck racecheck; do
        if [[ -z $sanitizer ]]; then
            note "$(printf '%-10s not run: there is no compute-sanitizer' "$tool")"
        else
            # Without caching every tensor is an allocation of its own: accesses beyond it are seen.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 60 sanitizer.log "$sanitizer" --tool "$tool" --error-exitcode 9 \
                "$python" -W ignore "$here/bench_contmix.py" --check --device cuda
        fi
    done
fi

echo
for record in "$out"/{bench,compiled}.json; do
    [[ -s $record ]] && "$python" -W ignore "$here/harness.py" "$record" | tee -a "$summary"
done
echo
note "$( ((failed)) && echo 'FAILED: see above' || echo 'all parts passed'); results in $out"
# The results of the parts once more: the last lines are the ones that are read.
grep -E '^(build|small_case|bench|compiled|tests|memcheck|racecheck) ' "$summary"
exit "$failed"
