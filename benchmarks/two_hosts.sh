#!/usr/bin/env bash
# Trains on two machines that share no files: two network namespaces joined by a cable (veth), each with its own copy of
# the checkout, its data and its model. A run that Ctrl-C ends on one machine, and that is resumed, has to give the
# weights of a run that nobody interrupted. On the CPU; needs Linux, root and the program ip:
#   sudo env "PATH=$PATH" bash benchmarks/two_hosts.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT=${OUTPUT:-outputs/two_hosts}  # deleted at the start
STEPS=${STEPS:-60}                   # of 2 samples; training is interrupted as soon as one is done
HOSTS=(pecn-first pecn-second)       # namespaces, host names, and folders in OUTPUT
ADDRESSES=(10.99.77.1 10.99.77.2)

if (( EUID != 0 )); then
  echo 'error: network namespaces need root: sudo env "PATH=$PATH" bash benchmarks/two_hosts.sh' >&2
  exit 1
fi

clean_up() {
  for job in $(jobs -p); do kill -KILL -- "-$job" 2> /dev/null || true; done
  for host in "${HOSTS[@]}"; do ip netns delete "$host" 2> /dev/null || true; done  # and with them the cable
}
trap clean_up EXIT
set -m  # each background job is a process group that Ctrl-C (SIGINT) reaches as in a terminal

for rank in 0 1; do ip netns add "${HOSTS[rank]}"; done
ip link add eth0 netns "${HOSTS[0]}" type veth peer name eth0 netns "${HOSTS[1]}"
for rank in 0 1; do
  ip -n "${HOSTS[rank]}" address add "${ADDRESSES[rank]}/24" dev eth0
  for device in lo eth0; do ip -n "${HOSTS[rank]}" link set "$device" up; done
done

rm -rf -- "$OUTPUT"
mkdir -p -- "$OUTPUT/${HOSTS[0]}"
git ls-files -z | xargs -0 cp --parents -t "$OUTPUT/${HOSTS[0]}"
cd "$OUTPUT"
(
  cd "${HOSTS[0]}"
  python -m demo.make_clips --output_dir data/tiny --num_train_clips 9 --num_val_clips 3
  python -m data.dataset --data_dir data/tiny
  python -m data.video_loader --data_dir data/tiny --resolutions 64
  python -m demo.make_model --output_dir model --vae_train_steps 0 --text_train_steps 0 --unet_train_steps 0
)
cp -r -- "${HOSTS[@]}"
for rank in 0 1; do  # what `accelerate config` writes
  cat > "${HOSTS[rank]}/accelerate.yaml" << END
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
mixed_precision: 'no'
num_machines: 2
num_processes: 2
machine_rank: $rank
main_process_ip: ${ADDRESSES[0]}
main_process_port: 29500
same_network: true
rdzv_backend: static
END
done

# start RANK OUTPUT_DIR [RESUME]: training on one machine, in the background; $! is the job.
start() {
  (
    cd "${HOSTS[$1]}"
    # Only to this script is the machine's name one of its own.
    exec ip netns exec "${HOSTS[$1]}" unshare --uts bash -c 'hostname "$0"; exec "$@"' "${HOSTS[$1]}" \
      env OMP_NUM_THREADS=1 ACCELERATE_CONFIG=accelerate.yaml GLOO_SOCKET_IFNAME=eth0 DATA_DIR=data/tiny \
      PRETRAINED_MODEL=model OUTPUT_DIR="$2" RESUME="${3:-}" RESOLUTION=64 BATCH_SIZE=1 MAX_TRAIN_STEPS="$STEPS" \
      NUM_VALIDATION_IMAGES=0 CHECKPOINTS_TOTAL_LIMIT=1 \
      bash train_instruct_pix2pix.sh
  ) > "$1-$2.log" 2>&1 &
}

# together OUTPUT_DIR [RESUME]: training on both, to the end; fails where one of them does.
together() {
  local jobs=()
  for rank in 0 1; do start "$rank" "$@"; jobs+=($!); done
  wait "${jobs[0]}" && wait "${jobs[1]}"
}

# What both said of a run, without the progress bars and what the libraries say.
show() {
  for rank in 0 1; do
    tr '\r' '\n' < "$rank-$1.log" | sed -nE "s/^(error|training on|interrupted|stopping|resuming|the trained)/${HOSTS[rank]}: &/p"
  done
}

echo "== a run that nobody interrupts"
together whole || { tail -n 30 ./*-whole.log; exit 1; }
show whole

echo "== Ctrl-C on the second machine"
start 0 run; first=$!
start 1 run; second=$!
until grep -q "| [1-9][0-9]*/$STEPS " 0-run.log; do
  if ! kill -0 "$first" || ! kill -0 "$second"; then tail -n 30 ./*-run.log; exit 1; fi
  sleep 0.2
done
kill -INT -- "-$second"
if wait "$first" || wait "$second"; then echo "error: the run was not interrupted" >&2; exit 1; fi
show run
checkpoint=$(cd "${HOSTS[0]}"; echo run/checkpoint-*)
if [[ -e ${HOSTS[1]}/$checkpoint ]]; then echo "error: the second machine has it" >&2; exit 1; fi

echo "== resuming while the second machine lacks $checkpoint"
if together run latest; then echo "error: it trained" >&2; exit 1; fi
show run

echo "== resuming with a copy of it there"
mkdir -p -- "${HOSTS[1]}/run"
cp -r -- "${HOSTS[0]}/$checkpoint" "${HOSTS[1]}/run/"
together run latest || { tail -n 30 ./*-run.log; exit 1; }
show run

weights=unet/diffusion_pytorch_model.safetensors
cmp -- "${HOSTS[0]}/whole/$weights" "${HOSTS[0]}/run/$weights"
echo "the interrupted run has the weights of the uninterrupted one, bit for bit"
