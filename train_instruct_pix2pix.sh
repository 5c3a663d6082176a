#!/usr/bin/env bash
# Fine-tunes InstructPix2Pix on prepared Something-Something V2 frames. Every variable can also be set from outside:
#   RESOLUTION=96 OUTPUT_DIR=outputs/small bash train_instruct_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# A hub id or a directory; Stable Diffusion gets 4 more input channels.
PRETRAINED_MODEL=${PRETRAINED_MODEL:-timbrooks/instruct-pix2pix}
DATA_DIR=${DATA_DIR:-data/sthv2}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/instruct_pix2pix_128}
RESOLUTION=${RESOLUTION:-128}
INPUT_FRAME_IDX=${INPUT_FRAME_IDX:-20}     # any: every frame of a video can be the start
TARGET_FRAME_IDX=${TARGET_FRAME_IDX:-}     # empty: the next frame, 21
HORIZON=${HORIZON:-}                       # in place of the target: predict 5 frames later, or each of 1-10
PROGRESS=${PROGRESS:-False}                # True: prompts say how much is done; or a file of "python -m pecn.progress"
BATCH_SIZE=${BATCH_SIZE:-16}               # samples a step on each GPU
GRADIENT_ACCUM=${GRADIENT_ACCUM:-1}        # passes a step: 2 with BATCH_SIZE=8 are 16 samples too, in less memory
EPOCHS=${EPOCHS:-20}
MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-}       # overrides EPOCHS
LEARNING_RATE=${LEARNING_RATE:-}           # empty: 5e-6, with LORA=True 1e-4 (the demo's model: 8e-4 and 1e-3)
MODEL_GUIDANCE_SCALE=${MODEL_GUIDANCE_SCALE:-}  # 2: learn to draw in one pass what guidance draws; objects keep their looks
LORA=${LORA:-False}                        # True: an adapter is trained, in much less memory, and merged when saved
LR_SCHEDULER=${LR_SCHEDULER:-constant}     # or constant_with_warmup, linear, cosine
LR_WARMUP_STEPS=${LR_WARMUP_STEPS:-0}
SEED=${SEED:-42}
MIXED_PRECISION=${MIXED_PRECISION:-auto}   # bf16, fp16 or no; auto: bf16 if GPU or CPU have it, else fp16, on a CPU no
NUM_PROCESSES=${NUM_PROCESSES:-1}          # GPUs to use
CHECKPOINTING_STEPS=${CHECKPOINTING_STEPS:-1000}
CHECKPOINTS_TOTAL_LIMIT=${CHECKPOINTS_TOTAL_LIMIT:-2}  # each is the UNet three times, 10 GB; one more while saving
RESUME=${RESUME:-}                         # latest, or a checkpoint's directory
VALIDATION_EPOCHS=${VALIDATION_EPOCHS:-5}
NUM_VALIDATION_IMAGES=${NUM_VALIDATION_IMAGES:-4}  # the same entries each time, spread over the tasks
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-}   # several machines: a file that `accelerate config --config_file FILE` made
# Any other flags of train_instruct_pix2pix.py: "--use_ema --random_flip". A model that predicts the noise, which
# timbrooks/instruct-pix2pix does, cannot draw a frame in one step; "--prediction_type v_prediction
# --rescale_betas_zero_snr" makes it one of the velocity, which can (NUM_INFERENCE_STEPS=1 when sampling).
EXTRA_ARGS=${EXTRA_ARGS:-}

arguments=(
  --pretrained_model_name_or_path="$PRETRAINED_MODEL" --train_data_dir="$DATA_DIR"
  --add_progress="$PROGRESS" --use_lora="$LORA"
  --train_batch_size="$BATCH_SIZE" --gradient_accumulation_steps="$GRADIENT_ACCUM" --num_train_epochs="$EPOCHS"
)
if [[ -n $RESUME ]]; then arguments+=(--resume_from_checkpoint="$RESUME"); fi
if [[ -z $ACCELERATE_CONFIG ]]; then arguments+=(--mixed_precision="$MIXED_PRECISION"); fi
# Variables whose flag has the same name, where they are set; the last line has those of sample_from_pix2pix.sh, which
# say how validation predicts.
for name in OUTPUT_DIR RESOLUTION INPUT_FRAME_IDX TARGET_FRAME_IDX HORIZON PROMPT_PREFIX MAX_TRAIN_STEPS LEARNING_RATE LR_SCHEDULER \
  MODEL_GUIDANCE_SCALE LR_WARMUP_STEPS SEED CHECKPOINTING_STEPS CHECKPOINTS_TOTAL_LIMIT VALIDATION_EPOCHS NUM_VALIDATION_IMAGES \
  NUM_INFERENCE_STEPS IMAGE_GUIDANCE_SCALE GUIDANCE_SCALE SCHEDULER STRENGTH NUM_PREDICTIONS KEEP_BACKGROUND; do
  if [[ -n ${!name:-} ]]; then arguments+=("--${name,,}=${!name}"); fi
done

launch=(python)
if [[ -n $ACCELERATE_CONFIG ]]; then
  launch=(accelerate launch --config_file "$ACCELERATE_CONFIG")
elif (( NUM_PROCESSES > 1 )); then
  launch=(accelerate launch --multi_gpu --num_machines 1 --num_processes "$NUM_PROCESSES" --dynamo_backend no)
  launch+=(--mixed_precision no)  # of the launcher's own, which the flag above overrides
fi

export PYTHONUNBUFFERED=1
# torch's launcher passes these signals on, and leaves its processes so many seconds for saving a checkpoint.
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# glibc keeps freed memory for the next step, which on a CPU takes a third off a step of Stable Diffusion's size.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}

# What is printed goes to train.log too, of progress bars their last state. Off a terminal they move once a minute.
# tee and sed ignore signals, to show what training says last.
if [[ ! -t 1 ]]; then export TQDM_MININTERVAL=${TQDM_MININTERVAL:-60}; fi
mkdir -p -- "$OUTPUT_DIR"
exec > >(trap '' INT TERM HUP USR1; exec tee >(exec sed -u 's/.*\r//' >> "$OUTPUT_DIR/train.log")) 2>&1
# shellcheck disable=SC2086  # EXTRA_ARGS is a list of words
exec "${launch[@]}" train_instruct_pix2pix.py "${arguments[@]}" $EXTRA_ARGS
