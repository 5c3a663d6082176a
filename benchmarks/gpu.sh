#!/usr/bin/env bash
# On a GPU, in one command of at most 12 minutes: quality (the quick test), ways to sample, a training of the real size
# that is resumed half way, sampling from it, and the speed and memory of a training step. The output also goes to
# outputs/gpu/log.txt. It has not been run on a GPU yet. On a CPU, small (the variables of the first line are the quick
# test's), it takes a few minutes:
#   NUM_TRAIN_CLIPS=9 NUM_VAL_CLIPS=6 MAX_TRAIN_STEPS=2 \
#     MODEL=demo RESOLUTION=96 STEPS=4 BATCH_SIZE=2 PRECISION=no QUICK=True bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=${MODEL:-sd15}              # random weights of Stable Diffusion 1.5's size, or demo
RESOLUTION=${RESOLUTION:-128}
STEPS=${STEPS:-200}               # of a training with a checkpoint half way, from which it is resumed
BATCH_SIZE=${BATCH_SIZE:-16}
PRECISION=${PRECISION:-bf16}      # or fp16, no
QUICK=${QUICK:-False}             # True: few steps in the benchmarks
DATA_DIR=${DATA_DIR:-data/demo}   # where the quick test puts the embedded default
OUTPUT=${OUTPUT:-outputs/gpu}

mkdir -p -- "$OUTPUT"
exec > >(tee -a -- "$OUTPUT/log.txt") 2>&1
quick=()
if [[ $QUICK == True ]]; then quick=(--quick); fi
part() { echo "== after $SECONDS s: $1"; }

part "quality: the quick test"
env DATA_DIR="$DATA_DIR" DEMO_DIR="$DATA_DIR" TEST_OUTPUT="$OUTPUT/quick_test" bash test_train_instruct_pix2pix.sh

part "ways to sample"
python -m benchmarks.sampling_options --model_dir "$OUTPUT/quick_test/model" --data_dir "$DATA_DIR" \
  --num_samples 16 "${quick[@]}"

part "$STEPS steps with random weights of $MODEL's size, and sampling from the result"
python -m data.video_loader --data_dir "$DATA_DIR" --resolutions "$RESOLUTION"
python -c "from benchmarks.models import build_model; build_model('$MODEL').save_pretrained('$OUTPUT/$MODEL')"
run=$OUTPUT/$MODEL-$PRECISION
rm -rf -- "$run"
for steps in $((STEPS / 2)) "$STEPS"; do  # the second goes on from the checkpoint of the first
  env PRETRAINED_MODEL="$OUTPUT/$MODEL" DATA_DIR="$DATA_DIR" OUTPUT_DIR="$run" RESOLUTION="$RESOLUTION" \
    BATCH_SIZE="$BATCH_SIZE" MIXED_PRECISION="$PRECISION" MAX_TRAIN_STEPS="$steps" RESUME=latest \
    CHECKPOINTING_STEPS=$((STEPS / 2)) NUM_VALIDATION_IMAGES=2 bash train_instruct_pix2pix.sh
done
env MODEL_DIR="$run" OUTPUT_DIR="$run/samples_of_model" NUM_SAMPLES="$BATCH_SIZE" BATCH_SIZE="$BATCH_SIZE" \
  bash sample_from_pix2pix.sh

part "speed and memory of a training step"
python -m benchmarks.train_step --models "$MODEL" --resolution "$RESOLUTION" --mixed_precision "$PRECISION" \
  --batch_sizes "$BATCH_SIZE" "${quick[@]}"
part "done"
