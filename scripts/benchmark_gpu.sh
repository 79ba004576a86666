#!/usr/bin/env bash
# scripts/benchmark_gpu.sh DATA TOKENIZER [NAME...]: trains models of known shapes on one GPU.
#
# Weights are random, and rows of 4096 tokens hold packed instructions; for each it prints the JSON
# of scripts/benchmark.py. DATA has Alpaca's fields. NAMEs are of those below; without any, all run.
# 8B in full needs a GPU of more than 80 GiB.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
data=$(realpath "$1") tokenizer=$2
[ ! -e "$tokenizer" ] || tokenizer=$(realpath "$tokenizer")
shift 2
[ $# -gt 0 ] || set -- gpt2 llama-1b llama-1b-microbatches llama-8b-lora llama-8b
cd "$(dirname "$0")/.."

low="model.param_dtype=bfloat16 optimizer.state_dtype=bfloat16 optimizer.grad_dtype=bfloat16"
llama="model.config.model_type=llama model.config.vocab_size=128256
  model.config.max_position_embeddings=8192 model.config.num_key_value_heads=8
  model.config.num_attention_heads=32"
llama_1b="$llama model.config.hidden_size=2048 model.config.intermediate_size=8192
  model.config.num_hidden_layers=16 model.config.tie_word_embeddings=true"
llama_8b="$llama model.config.hidden_size=4096 model.config.intermediate_size=14336
  model.config.num_hidden_layers=32"
lora="model.peft_config.r=16 model.peft_config.target_modules=all-linear"

flags_of() {
  case $1 in
    gpt2) echo "model.config.model_type=gpt2 model.config.n_positions=4096 train.batch_size=16" ;;
    llama-1b) echo "$llama_1b train.batch_size=8" ;;
    llama-1b-microbatches) echo "$llama_1b train.batch_size=32 train.minibatch_size=8" ;;
    llama-8b-lora) echo "$llama_8b $lora model.param_dtype=bfloat16 train.batch_size=4" ;;
    llama-8b) echo "$llama_8b $low train.batch_size=4 model.remat=minimal" ;;
    *) echo "benchmark_gpu.sh: no shape is called $1" >&2 && return 2 ;;
  esac
}

for name in "$@"; do flags_of "$name" >/dev/null; done # before the first takes its time
for name in "$@"; do
  flags=$(flags_of "$name")
  words=()
  for flag in $flags; do words+=("--config.$flag"); done
  echo "== $name"
  python scripts/benchmark.py --config=configs/alpaca_gpt2.py "--config.data.train=$data" \
    "--config.tokenizer.tokenizer_path=$tokenizer" --config.model.init=random \
    --config.train.seq_length=4096 --config.data.eval_prompts=None "${words[@]}"
done
