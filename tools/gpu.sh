#!/usr/bin/env bash
# Programs for a quarter of an hour of one GPU; nothing is downloaded.
#
#     tools/gpu.sh speed OUT                 # the benchmark: three minutes at most
#     tools/gpu.sh tests OUT                 # tests/test_devices.py: four minutes at most, as it compiles
#     tools/gpu.sh teacher OUT SECONDS DATA  # a teacher of the images in the folder DATA, DATA/<class>/<image>
#     tools/gpu.sh student OUT SECONDS       # a student of that teacher
#     tools/gpu.sh gan OUT SECONDS           # a GAN phase from that student
#     tools/gpu.sh keep OUT NAME             # the EMA of teacher, guide, student or gan, in pieces of 15 MB
#
# The numbers of steps follow from what `speed` measured, so that each run ends within its seconds, with a whole cosine.
# OUT gets logs, grids and weights (cat OUT/teacher.pt.* > teacher.pt); the runs themselves stay in runs/gpu.
# Environment: PYTHON (python3), PRESET (cifar10_gpu), FLAGS of the program that runs (none), and for student and gan
# TEACHER and STUDENT, other files or folders (runs/gpu/teacher and runs/gpu/student). If that teacher does not name its
# images, FLAGS needs --dataset and --data_dir.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} PRESET=${PRESET:-cifar10_gpu} RUNS=runs/gpu
TEACHER=${TEACHER:-$RUNS/teacher} STUDENT=${STUDENT:-$RUNS/student}
mkdir -p "$2" "$RUNS"
# Training reuses what the benchmark has compiled.
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10 TORCHINDUCTOR_CACHE_DIR="$PWD/$RUNS/inductor"

# steps OUT SECONDS PART...: how many steps fit if the parts alternate, less a minute to start and a tenth in reserve.
steps() {
    "$PYTHON" - "$@" <<'PYTHON'
import json, sys
out, seconds, *names = sys.argv[1:]
parts = json.load(open(f"{out}/benchmark.json"))["parts"]
ms = [parts[name].get("recorded", parts[name]["launched"])["ms"] for name in names]
print(max(20, int(0.9 * (float(seconds) - 60) / (sum(ms) / len(ms) / 1e3))))
PYTHON
}

# train SCRIPT OUT NAME SECONDS STEPS FLAGS...
train() {
    local script=$1 out=$2 name=$3 minutes steps=$5
    minutes=$("$PYTHON" -c "print(max(0.3, ($4 - 20) / 60))")
    shift 5
    "$PYTHON" "$script" --preset "$PRESET" --run_dir "$RUNS/$name" --steps "$steps" --max_minutes "$minutes" \
        "$@" ${FLAGS:-} 2>&1 | tee "$out/$name.txt"
    cp "$RUNS/$name/log.jsonl" "$out/$name.jsonl"
    cp "$(find "$RUNS/$name/grids" -name '*teacher*.png' | sort | tail -n 1)" "$out/$name.png"
}

case $1 in
speed)
    timeout 200 "$PYTHON" -m tools.benchmark --max_seconds 150 ${FLAGS:-} --out "$2/benchmark.json" 2>&1 \
        | tee "$2/benchmark.txt" || echo "the benchmark failed, or took too long"
    ;;
tests)
    timeout 240 "$PYTHON" -m pytest -q tests/test_devices.py 2>&1 | tee "$2/tests.txt" \
        || echo "the tests failed, or took too long"
    ;;
teacher)
    train train0.py "$2" teacher "$3" "$(steps "$2" "$3" teacher_step)" --dataset folder --data_dir "$4"
    ;;
student)                                            # whose presets train the generator in every other step
    n=$(steps "$2" "$3" both_turns guidance_turn)
    train train.py "$2" student "$3" "$n" --teacher "$TEACHER" --fit_steps $((n / 10)) \
        --gan_steps $((n / 5)) --warmup_steps $((n / 35)) --discriminator_warmup_steps $((n / 35))
    ;;
gan)
    n=$(steps "$2" "$3" gan_turn)
    train train.py "$2" gan "$3" "$n" --teacher "$TEACHER" --init "$STUDENT" --fit_steps 0 --gan_steps "$n" \
        --discriminator_warmup_steps $((n / 6))
    ;;
keep)
    declare -A files=([teacher]=teacher/checkpoint.pt [guide]=teacher/guide.pt [student]=student/checkpoint.pt
        [gan]=gan/checkpoint.pt)
    "$PYTHON" - "$RUNS/${files[$3]}" "$RUNS/$3.pt" <<'PYTHON'
import sys
from support import checkpoint
checkpoint.save(sys.argv[2], checkpoint.slim(checkpoint.load(sys.argv[1])), compressed=True)
PYTHON
    split -b 15000000 -d "$RUNS/$3.pt" "$2/$3.pt."
    ;;
*)
    echo "tools/gpu.sh speed|tests|teacher|student|gan|keep OUT ..." >&2
    exit 2
    ;;
esac
