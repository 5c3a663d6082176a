#!/usr/bin/env bash
# Predicts frames of validation videos with a trained model and scores them, or what follows one picture (IMAGE).
# Every variable can also be set from outside:
#   MODEL_DIR=test_output/model NUM_SAMPLES=10 bash sample_from_pix2pix.sh
#   IMAGE=photo.jpg PROMPT="pushing a cup from left to right" bash sample_from_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL_DIR=${MODEL_DIR:-outputs/instruct_pix2pix_128}  # a trained model's directory, or a model on the hub
FRAMES_DIR=${FRAMES_DIR:-data/sthv2/frames_128x128}   # of the resolution that the model was trained on
VAL_ANNOTATIONS=${VAL_ANNOTATIONS:-data/sthv2/annotations/val_filtered.json}  # entries to choose from
OUTPUT_DIR=${OUTPUT_DIR:-test_result/baseline}        # for pictures and scores; two runs at once into one are refused
INPUT_FRAME_IDX=${INPUT_FRAME_IDX:-20}                # the frame that is given
TARGET_FRAME_IDX=${TARGET_FRAME_IDX:-21}              # the frame to predict
NUM_SAMPLES=${NUM_SAMPLES:-3}                         # how many entries, spread over the tasks, or all
SEED=${SEED:-42}                                      # chooses the entries and their noise
NUM_INFERENCE_STEPS=${NUM_INFERENCE_STEPS:-20}        # denoising steps
IMAGE_GUIDANCE_SCALE=${IMAGE_GUIDANCE_SCALE:-1.5}     # how closely to follow the input frame; 1, the least, is none
GUIDANCE_SCALE=${GUIDANCE_SCALE:-1}                   # how closely to follow the sentence; 1, the least, is none
SCHEDULER=${SCHEDULER:-euler_ancestral}               # or euler, ddim, dpmsolver++
STRENGTH=${STRENGTH:-1}                               # below 1: this share of the steps, from the noised input frame
NUM_PREDICTIONS=${NUM_PREDICTIONS:-1}                 # of each frame; of several their mean and spread are shown too
# Keeps the input frame where the model changes nothing: each pixel lies between it and the decoded prediction, by
# Wiener's gain of the change around it, where small changes count as noise, and in the mean those that the predictions
# disagree on. False decodes the whole picture.
RESIDUAL=${RESIDUAL:-True}
LPIPS=${LPIPS:-False}                                 # score it too; needs lpips, and a torchvision that matches torch
BATCH_SIZE=${BATCH_SIZE:-8}                           # pictures at once; the predictions of one frame go together
IMAGE=${IMAGE:-}                                      # a picture of your own, in place of videos and frames
PROMPT=${PROMPT:-}                                    # what is done in it

export HF_HUB_CACHE=${HF_HUB_CACHE:-$PWD/.cache/huggingface/hub}

arguments=(
  --model_dir "$MODEL_DIR"
  --frames_dir "$FRAMES_DIR"
  --val_annotations "$VAL_ANNOTATIONS"
  --output_dir "$OUTPUT_DIR"
  --input_frame_idx "$INPUT_FRAME_IDX"
  --target_frame_idx "$TARGET_FRAME_IDX"
  --num_samples "$NUM_SAMPLES"
  --seed "$SEED"
  --num_inference_steps "$NUM_INFERENCE_STEPS"
  --image_guidance_scale "$IMAGE_GUIDANCE_SCALE"
  --guidance_scale "$GUIDANCE_SCALE"
  --scheduler "$SCHEDULER"
  --strength "$STRENGTH"
  --num_predictions "$NUM_PREDICTIONS"
  --residual "$RESIDUAL"
  --lpips "$LPIPS"
  --batch_size "$BATCH_SIZE"
)
if [[ -n $IMAGE ]]; then arguments+=(--image "$IMAGE"); fi
if [[ -n $PROMPT ]]; then arguments+=(--prompt "$PROMPT"); fi

exec python sample_from_pix2pix.py "${arguments[@]}" "$@"  # such as --progress 40
