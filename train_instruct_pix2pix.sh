#!/usr/bin/env bash
# Fine-tunes InstructPix2Pix on prepared Something-Something V2 frames. Every variable can also be set from outside:
#   RESOLUTION=96 OUTPUT_DIR=outputs/small bash train_instruct_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PRETRAINED_MODEL=${PRETRAINED_MODEL:-timbrooks/instruct-pix2pix}  # hub id or directory
DATA_DIR=${DATA_DIR:-data/sthv2}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/instruct_pix2pix_128}
RESOLUTION=${RESOLUTION:-128}
INPUT_FRAME_IDX=${INPUT_FRAME_IDX:-20}
TARGET_FRAME_IDX=${TARGET_FRAME_IDX:-21}
PROGRESS=${PROGRESS:-False}                # True: prompts say how much of the action is done
BATCH_SIZE=${BATCH_SIZE:-8}                # per process
GRADIENT_ACCUM=${GRADIENT_ACCUM:-2}
EPOCHS=${EPOCHS:-20}
MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-}       # overrides EPOCHS
LEARNING_RATE=${LEARNING_RATE:-5e-6}
LR_SCHEDULER=${LR_SCHEDULER:-constant}
LR_WARMUP_STEPS=${LR_WARMUP_STEPS:-0}
SEED=${SEED:-42}
MIXED_PRECISION=${MIXED_PRECISION:-fp16}   # no, fp16 or bf16
NUM_PROCESSES=${NUM_PROCESSES:-1}          # GPUs to use
CHECKPOINTING_STEPS=${CHECKPOINTING_STEPS:-500}
CHECKPOINTS_TOTAL_LIMIT=${CHECKPOINTS_TOTAL_LIMIT:-2}
RESUME=${RESUME:-}                         # latest, or a checkpoint's directory
VALIDATION_EPOCHS=${VALIDATION_EPOCHS:-5}
NUM_VALIDATION_IMAGES=${NUM_VALIDATION_IMAGES:-4}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-}   # file made by `accelerate config`; overrides the launch settings here
EXTRA_ARGS=${EXTRA_ARGS:-}                 # any other flags of train_instruct_pix2pix.py

# What is printed goes to train.log too. tee lives through signals, to show what training says last.
mkdir -p "$OUTPUT_DIR"
touch "$OUTPUT_DIR/train.log"
log_start=$(( $(wc -c < "$OUTPUT_DIR/train.log") + 1 ))
exec 3>&1 > >(trap '' INT TERM HUP && exec tee -a "$OUTPUT_DIR/train.log") 2>&1
logger=$!
finish() {
  local status=$?
  exec > /dev/null 2>&1
  wait "$logger" || true
  if (( status && NUM_PROCESSES > 1 )); then  # the launcher's long report has buried the line that matters
    tail -c "+$log_start" "$OUTPUT_DIR/train.log" | tr '\r' '\n' | grep -aE '^(error:|interrupted) ' | tail -n 1 >&3 || true
  fi
  exit "$status"
}
trap finish EXIT

# Ctrl-C and SIGTERM are passed on to training, which saves a checkpoint; bash alone would leave it running.
training='' stopped=0 signals=0
stop() {
  stopped=$2 signals=$(( signals + 1 ))
  if [[ -n $training ]]; then kill -s "$1" "$training" 2> /dev/null || true; fi
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop TERM 129' HUP

# What torch's launcher leaves its processes after a signal, before it kills them: time for saving a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export HF_HUB_CACHE=${HF_HUB_CACHE:-$PWD/.cache/huggingface/hub} PYTHONUNBUFFERED=1

launch=(accelerate launch --quiet)
choose_launch() {
  if [[ -n ${HF_ENDPOINT:-} ]]; then
    export HF_ENDPOINT
    echo "models come from $HF_ENDPOINT"
  fi
  if [[ -n $ACCELERATE_CONFIG ]]; then
    launch+=(--config_file "$ACCELERATE_CONFIG")
    return
  fi
  if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null; then
    if nvidia-smi -L > /dev/null 2>&1; then
      echo "error: there is a GPU, but torch cannot use it; python -c 'import torch; torch.zeros(1).cuda()' says why"
      exit 1
    fi
    if [[ $MIXED_PRECISION == fp16 ]]; then
      MIXED_PRECISION=no
      echo "no GPU found: training on the CPU without mixed precision"
    fi
    cores=$(python -c "import os; print(os.cpu_count())")
    export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (cores + NUM_PROCESSES - 1) / NUM_PROCESSES ))}
  fi
  if (( NUM_PROCESSES == 1 )); then  # no launcher is needed, which would die of a signal before training does
    launch=(python)
    arguments+=(--mixed_precision "$MIXED_PRECISION")
    return
  fi
  launch+=(--num_machines 1 --dynamo_backend no --num_processes "$NUM_PROCESSES" --mixed_precision "$MIXED_PRECISION")
  launch+=(--multi_gpu)
}

arguments=(
  --pretrained_model_name_or_path "$PRETRAINED_MODEL"
  --train_data_dir "$DATA_DIR"
  --output_dir "$OUTPUT_DIR"
  --resolution "$RESOLUTION"
  --input_frame_idx "$INPUT_FRAME_IDX"
  --target_frame_idx "$TARGET_FRAME_IDX"
  --train_batch_size "$BATCH_SIZE"
  --gradient_accumulation_steps "$GRADIENT_ACCUM"
  --num_train_epochs "$EPOCHS"
  --learning_rate "$LEARNING_RATE"
  --lr_scheduler "$LR_SCHEDULER"
  --lr_warmup_steps "$LR_WARMUP_STEPS"
  --seed "$SEED"
  --checkpointing_steps "$CHECKPOINTING_STEPS"
  --checkpoints_total_limit "$CHECKPOINTS_TOTAL_LIMIT"
  --validation_epochs "$VALIDATION_EPOCHS"
  --num_validation_images "$NUM_VALIDATION_IMAGES"
)
case $PROGRESS in
  [Tt]rue) arguments+=(--add_progress) ;;
  [Ff]alse) ;;
  *) echo "error: PROGRESS must be True or False, not '$PROGRESS'" && exit 1 ;;
esac
# How validation predicts: the variables of sample_from_pix2pix.sh, where they are set.
for name in NUM_INFERENCE_STEPS IMAGE_GUIDANCE_SCALE GUIDANCE_SCALE SCHEDULER STRENGTH NUM_PREDICTIONS; do
  if [[ -n ${!name:-} ]]; then arguments+=("--${name,,}" "${!name}"); fi
done
case ${RESIDUAL:-True} in
  [Tt]rue) arguments+=(--residual) ;;
  [Ff]alse) arguments+=(--no-residual) ;;
  *) echo "error: RESIDUAL must be True or False, not '$RESIDUAL'" && exit 1 ;;
esac
case ${WIENER_GAIN:-auto} in
  [Tt]rue) arguments+=(--wiener_gain) ;;
  [Ff]alse) arguments+=(--no-wiener_gain) ;;
  auto) ;;
  *) echo "error: WIENER_GAIN must be True, False or auto, not '$WIENER_GAIN'" && exit 1 ;;
esac
if [[ -n $MAX_TRAIN_STEPS ]]; then arguments+=(--max_train_steps "$MAX_TRAIN_STEPS"); fi
if [[ -n $RESUME ]]; then arguments+=(--resume_from_checkpoint "$RESUME"); fi

choose_launch
if (( stopped )); then
  echo "interrupted before the first step: there is nothing to save, run the same command again"
  exit "$stopped"
fi
set -m  # a process group of its own, so that each signal reaches training once, through `stop`
# shellcheck disable=SC2086  # EXTRA_ARGS is a list of words
"${launch[@]}" train_instruct_pix2pix.py "${arguments[@]}" $EXTRA_ARGS 3>&- &
training=$!
set +m
if (( stopped )); then kill -s TERM "$training" 2> /dev/null || true; fi
seen=-1
while (( seen != signals )); do  # a signal ends the waiting, but not yet the training
  seen=$signals status=0
  wait "$training" || status=$?
done
if (( status == 137 )); then
  echo "error: training was killed, mostly for want of memory: lower BATCH_SIZE (and raise GRADIENT_ACCUM by as much) or" \
    "RESOLUTION, or set EXTRA_ARGS=--gradient_checkpointing; RESUME=latest goes on from the newest checkpoint"
fi
if (( status && stopped )); then status=$stopped; fi
exit "$status"
