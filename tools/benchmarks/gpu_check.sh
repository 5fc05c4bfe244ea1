#!/usr/bin/env bash
# Build the ContMix operator for the GPU of this machine, test it there and measure it, in less than 8 minutes.
#
#   bash tools/benchmarks/gpu_check.sh [--out DIR] [--device cuda|cpu] [--prebuilt] [--tiny]
#
#   --out DIR       where results and logs go; default $OUT, or ./gpu_check_out
#   --device cpu    the same on the CPU: a trial of this script
#   --prebuilt      use the binary that is in the checkout
#   --tiny          the smallest measurements: a trial of this script
#
# Needs torch, setuptools, pytest and, for a GPU, a CUDA toolkit (nvcc) that fits torch; nothing of OpenMMLab and no
# network. PYTHON names the interpreter (python3). Builds in a copy of the sources, in a temporary folder.
# TOTAL_SECONDS (470) bounds it all; a part that is too slow is ended and reported, and the next one runs.
# Ends with 0 if all parts went well, 1 if one did not, 2 if it could not start.
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
# Not resolved: a virtual environment's interpreter is a link.
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

# part NAME SECONDS LOG COMMAND...: run it with its output in LOG, and note how it went.
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
        124 | 137) note "$(printf '%-10s FAILED: ended after %s' "$name" "$end")" ;;
        *) note "$(printf '%-10s FAILED with %d, %s: see %s' "$name" "$code" "$end" "$log")" ;;
    esac
    if ((code)); then
        failed=1
        tail -n 12 "$log" | cut -c1-300 | sed 's/^/    /'
    fi
    return "$code"
}

rm -f "$out"/{build,bench,tests,sanitizer}.log "$out"/bench.{json,md,png}

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
    # In place: it takes setuptools alone, whatever pip and wheel the machine has.
    part build 220 build.log bash -c 'cd "$1" && "$2" setup.py build_ext --inplace' - "$source" "$python"
fi

# From here on nothing runs in the checkout, so that the copy is what is imported.
cd "$work" || exit 2
"$python" -W ignore -m overlock_mm.ops 2>&1 | tee -a "$summary"

part small_case 40 tests.log "$python" -W ignore "$here/contmix_small_case.py" --device "$device"

# ---- the numbers: first what detection trains with, then the rest as time allows
settings=(--arch t b s xt --input 800x1344 512x512 224x224 --batch 2 1 16 --dtype float32 bfloat16)
settings+=(--baselines reference published --compile-reference 2 --seconds 0.3 --max-rounds 15 --time-limit 105)
if ((tiny)); then
    settings=(--arch t --input 224x224 --stage 4 --baselines reference --seconds 0.2 --min-rounds 3 --max-rounds 3)
fi
part bench 150 bench.log "$python" -W ignore "$here/bench_contmix.py" --device "$device" "${settings[@]}" \
    --json "$out/bench.json" --markdown "$out/bench.md" --plot "$out/bench.png"

# ---- the operator's tests, those of a GPU; the emulation of CUDA on the CPU is for machines without one
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
            # torch's allocator would hand out parts of one large block, and hide an access beyond a tensor.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 60 sanitizer.log "$sanitizer" --tool "$tool" --error-exitcode 9 \
                "$python" -W ignore "$here/contmix_small_case.py" --device cuda
        fi
    done
fi

echo
if [[ -s $out/bench.json ]]; then
    "$python" -W ignore "$here/bench_contmix.py" --report "$out/bench.json" --short | cut -c1-220 | tee -a "$summary"
fi
echo
note "$( ((failed)) && echo 'FAILED: see above' || echo 'all parts went well'); results in $out"
# How each part went, once more: what is printed last is what is read.
grep -E '^(build|small_case|bench|tests|memcheck|racecheck) ' "$summary"
exit "$failed"
