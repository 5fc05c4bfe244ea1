#!/usr/bin/env bash
# Tests and measurements on a machine with a GPU, in calls of less than ten minutes each.
#
#   bash tools/benchmarks/gpu_check.sh wheels [--wheels DIR]      # beforehand, where there is a network
#   bash tools/benchmarks/gpu_check.sh CALL [--out DIR] [--wheels DIR] [--device cuda|cpu] [--prebuilt] [--tiny]
#
#   operators   tests of the operators and of the network that need a GPU, and compute-sanitizer
#   network     training steps at 800x1344 beside ConvNeXt and Swin: float32 with and without TF32, bfloat16 and float16,
#               both layouts, with_cp, a CUDA graph, compiled. gpu_memory.py compares the memory with the counted one
#   kernels     depth-wise convolutions and ContMix beside PyTorch's, and the kernels of a training step by name
#   counters    what Nsight Compute (ncu) says of the kernels of ContMix and of the depth-wise convolutions
#   again       a short one of each, after a repair
#
#   --out DIR      for CALL.md, CALL.log and the records (JSON); default: $OUT or ./gpu_check_out
#   --wheels DIR   packages that the machine lacks (mmengine and what it needs); default: work_dirs/wheels in the checkout
#   --device cpu   the same on the CPU, to try this script
#   --prebuilt     use the binary in the checkout
#   --tiny         the smallest measurements, to try this script
#
# Every call first compiles the operators for this GPU, in a copy of the sources. It needs torch, torchvision, setuptools,
# pytest and, for a GPU, a CUDA toolkit that fits torch, but no network and no OpenMMLab: those wheels are unpacked. PYTHON
# names the interpreter (python3). TOTAL_SECONDS (560) limits a call: a part that is too slow is stopped, and reported. The exit
# status is 0 if all parts passed, 1 if one failed, 2 if the script could not start.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
call= out=${OUT:-gpu_check_out} wheels=$root/work_dirs/wheels device=cuda prebuilt=0 tiny=()

stop() {
    echo "gpu_check: $*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --out | --wheels | --device)
            (($# > 1)) || stop "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --prebuilt) prebuilt=1 ;;
        --tiny) tiny=(--tiny) ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        wheels | operators | network | kernels | counters | again)
            [[ -z $call ]] || stop "one call at a time, got $call and $1"
            call=$1
            ;;
        *) stop "unknown argument $1 (see --help)" ;;
    esac
    shift
done
[[ -n $call ]] || stop "which call? (see --help)"
[[ $device == cuda || $device == cpu ]] || stop "--device must be cuda or cpu, got $device"

python=$(command -v "${PYTHON:-python3}") || stop "there is no ${PYTHON:-python3}; PYTHON names the interpreter"
# The link is not resolved: the interpreter of a virtual environment is a link.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
if [[ $call == wheels ]]; then
    "$python" -m pip download --no-deps --dest "$wheels" -r "$root/requirements/gpu_check.txt"
    exit
fi
"$python" -c 'import torch' 2>/dev/null || stop "$python has no torch; PYTHON names another interpreter"
arch=
if [[ $device == cuda ]]; then
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
    [[ -n $arch ]] || stop "torch sees no GPU on this machine (--device cpu tries this script without one)"
else
    export CUDA_VISIBLE_DEVICES=
fi
mkdir -p "$out" || stop "cannot make $out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A wheel of Python code needs no more than to be unpacked.
mkdir "$work/source" "$work/site"
for wheel in "$wheels"/*.whl; do
    [[ ! -e $wheel ]] || "$python" -m zipfile -e "$wheel" "$work/site"
done
exclude=(--exclude=__pycache__)
((prebuilt)) || exclude+=('--exclude=*.so')
tar -C "$root" "${exclude[@]}" -cf - setup.py pyproject.toml README.md overlock_mm | tar -C "$work/source" -xf -
export PYTHONPATH=$work/source:$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if ((!prebuilt)); then
    export MAX_JOBS=${MAX_JOBS:-$(nproc)} FORCE_CUDA=$([[ -n $arch ]] && echo 1 || echo 0) TORCH_CUDA_ARCH_LIST=$arch
    # A build in place needs setuptools alone, and no certain pip or wheel.
    if ! (cd "$work/source" && timeout 300 "$python" setup.py build_ext --inplace) >"$out/$call.log" 2>&1; then
        tail -n 30 "$out/$call.log"
        stop "the build failed: see $out/$call.log"
    fi
fi
# Nothing runs in the checkout, so that Python imports the copy.
cd "$work"
exit_status=0
"$python" -W ignore "$here/gpu_check.py" "$call" --out "$out" --device "$device" "${tiny[@]}" \
    --seconds $((${TOTAL_SECONDS:-560} - SECONDS)) || exit_status=$?
exit "$exit_status"
