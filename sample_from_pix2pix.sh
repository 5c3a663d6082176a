#!/usr/bin/env bash
# Predicts frames of validation videos with a trained model and scores them, or what follows one picture (IMAGE).
# Every variable can also be set from outside:
#   MODEL_DIR=test_output/model NUM_SAMPLES=all bash sample_from_pix2pix.sh
#   ROLLOUT=10 OUTPUT_DIR=test_result/rollout bash sample_from_pix2pix.sh
#   IMAGE=photo.jpg PROMPT="pushing a cup from left to right" bash sample_from_pix2pix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL_DIR=${MODEL_DIR:-outputs/instruct_pix2pix_128}  # a trained model's directory, or a model on the hub
OUTPUT_DIR=${OUTPUT_DIR:-}  # for pictures and scores (test_result/baseline, of an IMAGE test_result/<its name>-<n>)
NUM_SAMPLES=${NUM_SAMPLES:-8}                         # how many videos, spread over the tasks, or all
SEED=${SEED:-42}                                      # chooses the videos and their noise
BATCH_SIZE=${BATCH_SIZE:-8}                           # pictures at once
IMAGE=${IMAGE:-}                                      # a picture of your own, in place of videos
CROP=${CROP:-}                                        # True: its middle square, in place of squashing it
PROMPT=${PROMPT:-}                                    # what is done in it
ROLLOUT=${ROLLOUT:-}                                  # 10: the 10 frames after the input frame, as films and filmstrips
ROLLOUT_MODE=${ROLLOUT_MODE:-}  # direct: each from the input frame; chained: each from the prediction before

# Unset options come from the model's training_config.json. In parentheses: where it has none, as the hub's models.
DATA_DIR=${DATA_DIR:-}                          # (data/sthv2)
RESOLUTION=${RESOLUTION:-}                      # (128)
INPUT_FRAME_IDX=${INPUT_FRAME_IDX:-}            # the frame that is given, or any: one drawn for each video (20)
TARGET_FRAME_IDX=${TARGET_FRAME_IDX:-}          # the frame to predict (21)
HORIZON=${HORIZON:-}                            # in place of the target: predict so many frames later
PROGRESS=${PROGRESS:-}                          # True, False or a file, as in training; of an IMAGE a percentage (False)
PROMPT_PREFIX=${PROMPT_PREFIX:-}                # what prompts begin with
NUM_INFERENCE_STEPS=${NUM_INFERENCE_STEPS:-}    # denoising steps (20)
IMAGE_GUIDANCE_SCALE=${IMAGE_GUIDANCE_SCALE:-}  # how closely to follow the input frame; 1, the least, is none (1.5)
GUIDANCE_SCALE=${GUIDANCE_SCALE:-}              # how closely to follow the sentence; 1, the least, is none (1)
SCHEDULER=${SCHEDULER:-}                        # or euler, dpmsolver++karras (euler_ancestral)
STRENGTH=${STRENGTH:-}                          # below 1: this share of the steps, from the noised input frame (1)
NUM_PREDICTIONS=${NUM_PREDICTIONS:-}            # draws of each frame; of several their mean and spread are shown too (1)
KEEP_BACKGROUND=${KEEP_BACKGROUND:-}            # True: keep the input's pixels where the model changes little (False)

arguments=()
if [[ -n $PROGRESS ]]; then arguments+=(--add_progress="$PROGRESS"); fi
for name in MODEL_DIR OUTPUT_DIR NUM_SAMPLES SEED BATCH_SIZE IMAGE CROP PROMPT ROLLOUT ROLLOUT_MODE DATA_DIR RESOLUTION \
  INPUT_FRAME_IDX TARGET_FRAME_IDX HORIZON PROMPT_PREFIX NUM_INFERENCE_STEPS IMAGE_GUIDANCE_SCALE GUIDANCE_SCALE \
  SCHEDULER STRENGTH NUM_PREDICTIONS KEEP_BACKGROUND; do
  if [[ -n ${!name} ]]; then arguments+=("--${name,,}=${!name}"); fi
done

exec python sample_from_pix2pix.py "${arguments[@]}" "$@"  # such as --against DIR
