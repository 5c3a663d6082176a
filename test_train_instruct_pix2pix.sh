#!/usr/bin/env bash
# The quick test: prepares data, fine-tunes for a minute and samples from the result, with the scripts and the
# code of the full training. Without Something-Something V2 it uses the embedded default: clips that demo/ renders and
# its small base model. Every variable can also be set from outside:
#   DATA_DIR=data/sthv2 PRETRAINED_MODEL=timbrooks/instruct-pix2pix bash test_train_instruct_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

DATA_DIR=${DATA_DIR:-}                  # empty: data/sthv2 if it is prepared, else the embedded default
PRETRAINED_MODEL=${PRETRAINED_MODEL:-}  # empty: timbrooks/instruct-pix2pix, or the demo's own for the embedded default
DEMO_DIR=${DEMO_DIR:-data/demo}         # where the embedded default's clips go
NUM_TRAIN_CLIPS=${NUM_TRAIN_CLIPS:-400}
NUM_VAL_CLIPS=${NUM_VAL_CLIPS:-60}
TEST_OUTPUT=${TEST_OUTPUT:-test_output}
export RESOLUTION=${RESOLUTION:-96} SEED=${SEED:-42}

if [[ -z $DATA_DIR && -d data/sthv2/frames_${RESOLUTION}x${RESOLUTION} ]]; then DATA_DIR=data/sthv2; fi
if [[ -n $DATA_DIR && $DATA_DIR != "$DEMO_DIR" ]]; then
  echo "data: $DATA_DIR (DATA_DIR=$DEMO_DIR chooses the embedded default)"
  PRETRAINED_MODEL=${PRETRAINED_MODEL:-timbrooks/instruct-pix2pix}
else
  DATA_DIR=$DEMO_DIR
  echo "data: the embedded default in $DATA_DIR (set DATA_DIR, or prepare data/sthv2, to use your own)"
  echo "1/5 rendering clips: half a minute"
  python -m demo.make_clips --output_dir="$DATA_DIR" --num_train_clips "$NUM_TRAIN_CLIPS" --num_val_clips "$NUM_VAL_CLIPS" |
    sed '/^Next: /d'
  echo "2/5 choosing clips and extracting their frames: seconds"
  python -m data.dataset --data_dir="$DATA_DIR" --seed "$SEED" | sed 's/ Next: .*//'
  python -m data.video_loader --data_dir="$DATA_DIR" --resolutions "$RESOLUTION"
  PRETRAINED_MODEL=${PRETRAINED_MODEL:-demo/base_model}
  export PROGRESS=${PROGRESS:-True} EXTRA_ARGS=${EXTRA_ARGS:---random_flip}
fi
# The demo's model is small: it learns fast. Any other model is sampled from as sample_from_pix2pix.sh does it.
if [[ $PRETRAINED_MODEL == demo/base_model ]]; then
  if [[ ${LORA:-False} == [Tt]rue ]]; then rate=1e-3; else rate=8e-4; fi
  export MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-150} LEARNING_RATE=${LEARNING_RATE:-$rate}
  export MODEL_GUIDANCE_SCALE=${MODEL_GUIDANCE_SCALE:-3}
  export LR_SCHEDULER=${LR_SCHEDULER:-cosine} LR_WARMUP_STEPS=${LR_WARMUP_STEPS:-20}
  export NUM_INFERENCE_STEPS=${NUM_INFERENCE_STEPS:-8} SCHEDULER=${SCHEDULER:-euler}
  export IMAGE_GUIDANCE_SCALE=${IMAGE_GUIDANCE_SCALE:-1}
  export NUM_SAMPLES=${NUM_SAMPLES:-all} NUM_PREDICTIONS=${NUM_PREDICTIONS:-3}
fi
export MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-20}
export DATA_DIR PRETRAINED_MODEL
echo "base model: $PRETRAINED_MODEL (PRETRAINED_MODEL chooses another)"

echo "3/5 training: a minute"
rm -rf -- "$TEST_OUTPUT/base_samples"  # of an earlier quick test
if [[ -z ${RESUME:-} ]]; then rm -rf -- "$TEST_OUTPUT/model"; fi
OUTPUT_DIR="$TEST_OUTPUT/model" BATCH_SIZE="${BATCH_SIZE:-8}" bash train_instruct_pix2pix.sh

# What did fine-tuning add? The base model predicts the same pairs; a plain Stable Diffusion, which cannot, is refused.
echo "4/5 predicting with the base model: seconds"
against=()
if MODEL_DIR="$PRETRAINED_MODEL" OUTPUT_DIR="$TEST_OUTPUT/base_samples" NUM_PREDICTIONS=1 bash sample_from_pix2pix.sh > /dev/null; then
  against=(--against "$TEST_OUTPUT/base_samples")
elif (( $? > 128 )); then  # Ctrl-C
  exit 130
fi
echo "5/5 predicting with the trained model: seconds"
MODEL_DIR="$TEST_OUTPUT/model" OUTPUT_DIR="$TEST_OUTPUT/samples" bash sample_from_pix2pix.sh "${against[@]}"

echo "the quick test is done; look at $TEST_OUTPUT/samples/random_pairs.png and $TEST_OUTPUT/model/validation/, and run:"
echo "  tensorboard --logdir=$TEST_OUTPUT/ --port 6007 --samples_per_plugin images=100"
