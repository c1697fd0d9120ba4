#!/usr/bin/env bash
# The accuracy and step-time benchmarks on a machine with a GPU, in steps of under nine minutes that go on where they stopped.
#
#   benchmarks/gpu.sh data FOLDER   take in a part of the data (and the weights); once per part, any number of parts
#   benchmarks/gpu.sh check         a minute of every method on few images: does everything run here?
#   benchmarks/gpu.sh sweep         learning rates, on held-out training images
#   benchmarks/gpu.sh resnet56      trained gates, all seeds
#   benchmarks/gpu.sh peers         the other methods on ResNet-56, all seeds
#   benchmarks/gpu.sh resnet20      every method on ResNet-20, all seeds
#   benchmarks/gpu.sh step-time     time of a training step gated / plain, eager and compiled
#   benchmarks/gpu.sh recording     what recording samples adds to a step
#   benchmarks/gpu.sh learnability  three architectures, three seeds: which samples are hard
#   benchmarks/gpu.sh dense         the networks that `layers` starts from (Fashion-MNIST's idx.gz files lie beside CIFAR-10)
#   benchmarks/gpu.sh layers        sparsity by layer: every allocator, method and total, with fine-tuning
#   benchmarks/gpu.sh analysis      time and memory of tracing and planning
#   benchmarks/gpu.sh table         the table so far
#   benchmarks/gpu.sh state         pack the checkpoints of unfinished runs, to go on elsewhere (give them back with `data`)
#
# A step that ends with status 75 is not finished: call it again. Settings, by environment variable:
set -euo pipefail

OUT=${OUT:-runs/gpu}                 # results and logs are copied here at the end of every step
WORK=${WORK:-/tmp/prunewise-gpu}     # data, checkpoints and results; must outlive a step
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-500}                  # seconds of one step
JOBS=${JOBS:-6}                      # runs side by side: one alone cannot fill a large GPU
EPOCHS=${EPOCHS:-60}
SWEEP_EPOCHS=${SWEEP_EPOCHS:-10}
RATES=${RATES:-0.01,0.02,0.05,0.1}
LR=${LR:-auto}                       # 'auto' takes the choice of `sweep`; or a number for all
SEEDS=${SEEDS:-0 1 2}
PEERS=${PEERS:-l1_uniform hybrid_global gates_descent tp_magnitude tp_magnitude_global tp_group_norm taylor_global dense}
FLAGS=${FLAGS:---bf16 --channels-last --inner-only}
COMPILE=${COMPILE:-}                 # 1: train under torch.compile (pays for long runs only)
UNPACK=${UNPACK:-}                   # command that makes cifar-10-batches-bin in "$WORK/data" from the parts in "$WORK/parts"

cd "$(dirname "$0")/.."
mkdir -p "$OUT" "$WORK/data" "$WORK/parts" "$WORK/results" "$WORK/checkpoints"
OUT=$(realpath "$OUT")
WORK=$(realpath "$WORK")
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
DEADLINE=$(($(date +%s) + LIMIT))
STEP=${1:-help}
LOG=$OUT/$STEP.log
RESULTS=$WORK/results
export OUT WORK RESULTS PYTHON EPOCHS SWEEP_EPOCHS LR FLAGS COMPILE DEADLINE LOG
FILES=(data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch)

take() { # FOLDER
  find "$1" -maxdepth 1 -name '*.safetensors' -exec cp {} "$WORK/data/" \;
  find "$1" -maxdepth 1 -name 'cifar.jsonl' -exec cp -n {} "$WORK/results/" \;
  if compgen -G "$1/state.*" >/dev/null; then cat "$1"/state.* | tar -C "$WORK" -xf -; fi
  find "$1" -type f ! -name '*.safetensors' ! -name 'cifar.jsonl' ! -name 'state.*' -exec cp {} "$WORK/parts/" \;
  local bins="$WORK/data/cifar-10-batches-bin"
  mkdir -p "$bins"
  find "$WORK/parts" -name '*_batch*.bin' -exec mv {} "$bins/" \;
  find "$WORK/parts" -name '*-ubyte.gz' -exec mv {} "$WORK/data/" \;
  if [ -n "$UNPACK" ]; then (cd "$WORK/parts" && bash -c "$UNPACK"); fi
  local missing=()
  for name in "${FILES[@]}"; do [ -f "$bins/$name.bin" ] || missing+=("$name"); done
  echo "missing: ${missing[*]:-nothing}"
  if [ ${#missing[@]} -eq 0 ]; then
    (cd "$bins" && md5sum -c) <<'SUMS'
5dd7e06a14cb22eb9f671a540d1b7c25  data_batch_1.bin
5ea93a67294ea407fff1d09f752e9692  data_batch_2.bin
942cd6a4bcdd0dd3c604fbe906cb4421  data_batch_3.bin
ae636b3ba5c66a11e91e8cb52e771fcb  data_batch_4.bin
53f37980c15c3d472c316c40844f3f0d  data_batch_5.bin
803d5f7f4d78ea53de84dbe85f74fb6d  test_batch.bin
SUMS
  fi
}

cifar() { # options: one run of cifar.py with the shared ones, within what is left of the step
  local left=$((DEADLINE - $(date +%s)))
  [ "$left" -gt 25 ] || return 75
  # shellcheck disable=SC2086  # FLAGS is a list of words
  OMP_NUM_THREADS=1 "$PYTHON" benchmarks/cifar.py --data "$WORK/data" --weights "$WORK/data" --out "$RESULTS" \
    --work "$WORK/checkpoints" --sweep-epochs "$SWEEP_EPOCHS" --time-limit $((left - 15)) $FLAGS ${COMPILE:+--compile} "$@" >>"$LOG" 2>&1
}
export -f cifar

left() { # SCRIPT OPTIONS: one line of further options a run, on stdin; JOBS at a time, until the step's time is over
  local status=0
  xargs -P "$JOBS" -d '\n' -I{} timeout -s INT $((DEADLINE - $(date +%s) - 15)) \
    bash -c "OMP_NUM_THREADS=1 $PYTHON benchmarks/$1 $2 {} >>'$LOG' 2>&1" || status=$?
  if [ "$status" -ne 0 ]; then
    tail -n 20 "$LOG"
    echo "not finished, or failed: see above; call the step again to go on"
    exit 75
  fi
}

together() { # one line of options a run, on stdin; JOBS at a time
  local status=0
  xargs -P "$JOBS" -d '\n' -I{} bash -c 'cifar {}' || status=$?
  "$PYTHON" benchmarks/cifar.py --table --out "$RESULTS" | tee "$OUT/table.md"
  cp "$RESULTS/cifar.jsonl" "$OUT/" 2>/dev/null || true
  if [ "$status" -ne 0 ]; then
    tail -n 20 "$LOG"
    echo "not finished, or failed: see above; call the step again to go on"
    exit 75
  fi
}

runs() { # MODEL METHODS: every seed
  for method in $2; do
    for seed in $SEEDS; do
      echo "--model $1 --methods $method --seeds $seed --epochs $EPOCHS --lr $LR"
    done
  done | together
}

case $STEP in
data) take "${2:?which folder?}" ;;
check)
  nvidia-smi -L || true
  RESULTS=$WORK/check
  for method in gates $PEERS; do
    echo "--model resnet56 --methods $method --epochs 2 --lr 0.01 --train-subset 5120"
  done | together
  grep "'epoch'" "$LOG" | tail -n 20
  ;;
sweep)
  for method in gates $PEERS; do
    for lr in ${RATES//,/ }; do echo "--model ${MODEL:-resnet56} --methods $method --lr-sweep $lr"; done
  done | together
  ;;
resnet56) runs resnet56 gates ;;
peers) runs resnet56 "$PEERS" ;;
resnet20) runs resnet20 "gates $PEERS" ;;
step-time)
  for mode in "" --compile; do
    "$PYTHON" benchmarks/step_time.py --model resnet56 $mode --name "step_time_gpu${mode:+_compiled}" 2>&1 | tee -a "$LOG"
  done
  cp benchmarks/results/step_time_gpu* "$OUT/"
  ;;
recording)
  "$PYTHON" benchmarks/recording.py 2>&1 | tee -a "$LOG"
  cp benchmarks/results/recording_gpu* "$OUT/"
  ;;
learnability)
  # A run that is cut off begins anew; those that are done are not made again.
  for seed in $SEEDS; do
    for model in resnet20 vgg16 mobilenet; do echo "--models $model --seeds $seed --name architectures_$model$seed"; done
  done | left architectures.py "--data $WORK/data/cifar-10-batches-bin --epochs $EPOCHS --batch-size 128 --bf16 --out $WORK/learnability"
  "$PYTHON" benchmarks/architectures.py --data "$WORK/data/cifar-10-batches-bin" --epochs "$EPOCHS" --batch-size 128 --bf16 \
    --models resnet20,vgg16,mobilenet --seeds "${SEEDS// /,}" --out "$WORK/learnability" --name architectures_gpu
  cp benchmarks/results/architectures_gpu* "$OUT/"
  ;;
dense)
  printf '%s\n' "--dataset cifar10 --model vgg16 --epochs $EPOCHS" "--dataset fashion_mnist --model vgg16 --epochs $EPOCHS" \
    "--dataset fashion_mnist --model resnet56 --epochs $EPOCHS" |
    left dense.py "--data $WORK/data --out $WORK/dense --bf16 --time-limit $((LIMIT - 40))"
  cp "$WORK"/dense/dense.jsonl "$OUT/"
  ;;
layers)
  cp -n "$WORK"/data/*.safetensors "$WORK/dense/" 2>/dev/null || true
  for dataset in cifar10 fashion_mnist; do
    for model in resnet56 vgg16; do echo "--dataset $dataset --model $model"; done
  done | left layers.py "--data $WORK/data --weights $WORK/dense --out $WORK/layers --recover none,norm,tune --bf16 --time-limit $((LIMIT - 40))"
  cp "$WORK"/layers/*.jsonl "$OUT/"
  ;;
analysis)
  "$PYTHON" benchmarks/analysis.py 2>&1 | tee -a "$LOG"
  cp benchmarks/results/analysis* "$OUT/"
  ;;
table) "$PYTHON" benchmarks/cifar.py --table --out "$WORK/results" | tee "$OUT/table.md" ;;
state)
  tar -C "$WORK" -cf - checkpoints | split -d -b 15m - "$OUT/state."
  cp "$WORK/results/cifar.jsonl" "$OUT/" 2>/dev/null || true
  du -ch "$OUT"/state.* | tail -n 1
  ;;
*)
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  ;;
esac
