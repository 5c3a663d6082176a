#!/usr/bin/env bash
# On a GPU, in one command: the quick test, a run of the real size, the speed of training and sampling, and the memory
# that training takes. What it prints goes to outputs/gpu/log.txt too. It has not been run on a GPU yet. On a CPU, small
# (the variables of the first line are the quick test's), it takes 5 minutes on one core:
#   NUM_TRAIN_CLIPS=9 NUM_VAL_CLIPS=6 MAX_TRAIN_STEPS=2 \
#     MODEL=demo RESOLUTION=96 STEPS=4 BATCH_SIZE=2 PRECISIONS=no QUICK=True bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=${MODEL:-sd15}                    # random weights of Stable Diffusion 1.5's size, or demo
RESOLUTION=${RESOLUTION:-128}
STEPS=${STEPS:-200}                     # of a training with a checkpoint half way, from which it is resumed
BATCH_SIZE=${BATCH_SIZE:-16}
PRECISIONS=${PRECISIONS:-fp16 bf16}
QUICK=${QUICK:-False}                   # True: few steps in the benchmarks, of the demo's model
DATA_DIR=${DATA_DIR:-data/demo}         # where the quick test puts the embedded default
OUTPUT=${OUTPUT:-outputs/gpu}

mkdir -p -- "$OUTPUT"
exec > >(tee -a -- "$OUTPUT/log.txt") 2>&1
quick=()
if [[ $QUICK == True ]]; then quick=(--quick); fi

echo "== the quick test"
env DATA_DIR="$DATA_DIR" DEMO_DIR="$DATA_DIR" TEST_OUTPUT="$OUTPUT/quick_test" bash test_train_instruct_pix2pix.sh

echo "== $STEPS steps with random weights of $MODEL's size"
python -m data.video_loader --data_dir "$DATA_DIR" --resolutions "$RESOLUTION"
python -c "from benchmarks.models import build_model; build_model('$MODEL').save_pretrained('$OUTPUT/$MODEL')"
for precision in $PRECISIONS; do
  run=$OUTPUT/$MODEL-$precision
  rm -rf -- "$run"
  for steps in $((STEPS / 2)) "$STEPS"; do  # the second goes on from the checkpoint of the first
    env PRETRAINED_MODEL="$OUTPUT/$MODEL" DATA_DIR="$DATA_DIR" OUTPUT_DIR="$run" RESOLUTION="$RESOLUTION" \
      BATCH_SIZE="$BATCH_SIZE" MIXED_PRECISION="$precision" MAX_TRAIN_STEPS="$steps" RESUME=latest \
      CHECKPOINTING_STEPS=$((STEPS / 2)) NUM_VALIDATION_IMAGES=2 bash train_instruct_pix2pix.sh
  done
  env MODEL_DIR="$run" OUTPUT_DIR="$run/samples_of_model" NUM_SAMPLES=2 bash sample_from_pix2pix.sh
done

echo "== speed of a training step"
for precision in $PRECISIONS; do
  python -m benchmarks.train_step --models "$MODEL" --resolution "$RESOLUTION" --mixed_precision "$precision" \
    --batch_sizes "$BATCH_SIZE" "${quick[@]}"
done

echo "== speed of sampling"
python -m benchmarks.sampling "${quick[@]}"

echo "== memory of a training step"
python -m benchmarks.memory --resolution "$RESOLUTION" --batch_size "$BATCH_SIZE" "${quick[@]}"
