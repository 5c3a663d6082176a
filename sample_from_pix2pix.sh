#!/usr/bin/env bash
# Predicts frames of validation videos with a trained model and scores them, or what follows one picture (IMAGE).
# Every variable can also be set from outside:
#   MODEL_DIR=test_output/model NUM_SAMPLES=all bash sample_from_pix2pix.sh
#   ROLLOUT=10 OUTPUT_DIR=test_result/rollout bash sample_from_pix2pix.sh
#   IMAGE=photo.jpg PROMPT="pushing a cup from left to right" bash sample_from_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL_DIR=${MODEL_DIR:-outputs/instruct_pix2pix_128}  # a trained model's directory, or a model on the hub
OUTPUT_DIR=${OUTPUT_DIR:-test_result/baseline}        # for pictures and scores; two runs at once into one are refused
NUM_SAMPLES=${NUM_SAMPLES:-8}                         # how many entries, spread over the tasks, or all
SEED=${SEED:-42}                                      # chooses the entries and their noise
LPIPS=${LPIPS:-False}                                 # score it too; needs lpips, and a torchvision that matches torch
BATCH_SIZE=${BATCH_SIZE:-8}                           # pictures at once; the predictions of one frame go together
IMAGE=${IMAGE:-}                                      # a picture of your own, in place of videos and frames
PROMPT=${PROMPT:-}                                    # what is done in it
ROLLOUT=${ROLLOUT:-}                                  # 10: the 10 frames after the input frame, as films and filmstrips
# direct: each from the input frame; chained: each from the prediction before (direct if the model knows the horizons).
ROLLOUT_MODE=${ROLLOUT_MODE:-}

# Empty: as the model was trained and validated. In parentheses: for a model that does not say, such as the hub's.
FRAMES_DIR=${FRAMES_DIR:-}                      # of the model's resolution (data/sthv2/frames_128x128)
VAL_ANNOTATIONS=${VAL_ANNOTATIONS:-}            # entries to choose from (data/sthv2/annotations/val_filtered.json)
INPUT_FRAME_IDX=${INPUT_FRAME_IDX:-}            # the frame that is given, or any: one drawn for each video (20)
TARGET_FRAME_IDX=${TARGET_FRAME_IDX:-}          # the frame to predict (21)
HORIZON=${HORIZON:-}                            # in place of the target: predict so many frames later
PROGRESS_SOURCE=${PROGRESS_SOURCE:-}            # of the progress in prompts: oracle, estimated or none (none)
PROGRESS_ESTIMATOR=${PROGRESS_ESTIMATOR:-}      # for estimated: what "python -m pecn.progress train" made
NUM_INFERENCE_STEPS=${NUM_INFERENCE_STEPS:-}    # denoising steps (20)
IMAGE_GUIDANCE_SCALE=${IMAGE_GUIDANCE_SCALE:-}  # how closely to follow the input frame; 1, the least, is none (1.5)
GUIDANCE_SCALE=${GUIDANCE_SCALE:-}              # how closely to follow the sentence; 1, the least, is none (1)
SCHEDULER=${SCHEDULER:-}                        # or euler, ddim, dpmsolver++, dpmsolver++karras (euler_ancestral)
STRENGTH=${STRENGTH:-}                          # below 1: this share of the steps, from the noised input frame (1)
NUM_PREDICTIONS=${NUM_PREDICTIONS:-}            # of each frame; of several their mean and spread are shown too (1)
# Keeps the input frame where the model changes little: a change that is small around a pixel counts as noise (Wiener's
# gain). Most pixels of a sample are the input frame's or the prediction's; the mean mixes both, with more of the
# input frame where the predictions disagree. False shows the whole prediction (True).
RESIDUAL=${RESIDUAL:-}

arguments=()
for name in MODEL_DIR OUTPUT_DIR NUM_SAMPLES SEED LPIPS BATCH_SIZE IMAGE PROMPT ROLLOUT ROLLOUT_MODE FRAMES_DIR \
  VAL_ANNOTATIONS INPUT_FRAME_IDX TARGET_FRAME_IDX HORIZON PROGRESS_SOURCE PROGRESS_ESTIMATOR NUM_INFERENCE_STEPS \
  IMAGE_GUIDANCE_SCALE GUIDANCE_SCALE SCHEDULER STRENGTH NUM_PREDICTIONS RESIDUAL; do
  if [[ -n ${!name} ]]; then arguments+=("--${name,,}" "${!name}"); fi
done

exec python sample_from_pix2pix.py "${arguments[@]}" "$@"  # such as --progress 40
