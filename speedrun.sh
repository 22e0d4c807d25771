#!/usr/bin/env bash
# From raw Chinese text to a model that answers, on a CPU:
# corpus -> clean -> tokenizer -> pack -> pretrain -> instruction tuning, full and LoRA -> preferences
# -> 8 and 4 bits: size, perplexity, exam, speed.
#   bash speedrun.sh                  the token budget is chosen by a quick probe of this machine
#   bash speedrun.sh --budget full    full | half | quarter | tiny (tiny: seconds, for continuous integration)
#   bash speedrun.sh --seed 2         another world and another initialisation
set -euo pipefail
cd "$(dirname "$0")"

budget=auto out=out/speedrun seed=1
while [ $# -gt 0 ]; do
    case $1 in
        --budget) budget=${2:?--budget needs full, half, quarter, tiny or auto}; shift 2 ;;
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        *) echo "error: unknown argument $1 (known: --budget, --out, --seed)" >&2; exit 2 ;;
    esac
done
case $budget in full | half | quarter | tiny | auto) ;; *)
    echo "error: --budget $budget: expected full, half, quarter, tiny or auto" >&2; exit 2 ;;
esac
if [ -e "$out" ]; then
    echo "error: $out exists; remove it, or choose another --out" >&2; exit 2
fi
source ./setup.sh requirements.txt

mkdir -p "$out"
begin=$SECONDS
summary=""
stage() {  # stage NAME COMMAND...: run it, its output goes to NAME.log, one line on the screen
    local name=$1 start=$SECONDS
    shift
    if ! "$@" > "$out/$name.log" 2>&1; then
        tail -n 20 "$out/$name.log" >&2
        echo "error: the stage $name failed; all of its output is in $out/$name.log" >&2
        exit 1
    fi
    printf '%-10s %3d s   %s\n' "$name" $((SECONDS - start)) "$(grep . "$out/$name.log" | tail -n 1)"
    summary+="$name $((SECONDS - start)) s, "
}

stage corpus "$PYTHON" demo_corpus.py --out "$out/demo" --seed "$seed"
stage clean "$PYTHON" clean.py "$out/demo/pretrain" --out "$out/clean"
stage tokenizer "$PYTHON" tokenizer.py train "$out/clean" --vocab_size 3072 \
    --character_coverage 1 --out "$out/tok"
stage pack "$PYTHON" data.py pack "$out/clean" --tokenizer "$out/tok" --out "$out/shards"

train=("$PYTHON" train.py --preset demo --data "$out/shards" --row_tokens 256 --tokens_per_step 4096
       --optimizer muon --lr 4e-3 --schedule wsd --decay 0.4 --warmup 50 --final_lr 0.02
       --save_every 0 --eval_every 100 --seed "$seed")
if [ "$budget" = auto ]; then
    # the probe: a few steps tell the tokens per second; pretraining aims at four minutes
    stage probe "${train[@]}" --out "$out/probe" --steps 12 --eval_every 0
    budget=$("$PYTHON" - "$out/probe/metrics.jsonl" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
reach = 240 * statistics.median(r["tokens_per_second"] for r in rows if "loss" in r)
print("full" if reach > 2e6 else "half" if reach > 1e6 else "quarter")
PY
)
    rm -r "$out/probe"
fi
case $budget in full) tokens=2000000 ;; half) tokens=1000000 ;; quarter) tokens=500000 ;; tiny) tokens=40000 ;; esac
short=$([ "$budget" != tiny ] || echo "--steps 3")
echo "budget: $budget, $tokens tokens"
stage pretrain "${train[@]}" --tokens "$tokens" --out "$out/run"
stage sample "$PYTHON" generate.py "$out/run" --prompt "大家都知道，" --max_new_tokens 60 --temperature 0.7
sed '$d' "$out/sample.log"  # the last line stands above

# questions that no row of instruction data asks; the model has read the answers in the pretraining text
heldout=$out/demo/heldout.jsonl
answers() {  # answers NAME: how many of them the model of a stage gets right
    stage "$1-answers" "$PYTHON" generate.py "$out/$1" --questions "$heldout" --template plain \
        --temperature 0 --max_new_tokens 40 --batch 64
}
tune=(--row_tokens 256 --tokens_per_step 2048 --test "$heldout" --test_rows 100 --max_new_tokens 40 --eval_every 0
      --save_every 0 --keep 1 --schedule linear --warmup 10 --seed "$seed" $short)
answers run
stage sft "$PYTHON" sft.py --init "$out/run" --data "$out/demo/sft.jsonl" --template plain --out "$out/sft" \
    "${tune[@]}" --epochs 1 --lr 1e-3
answers sft
stage lora "$PYTHON" sft.py --init "$out/run" --data "$out/demo/sft.jsonl" --template plain --out "$out/lora" \
    "${tune[@]}" --epochs 1 --lora --lora_target all-linear --lora_rank 64 --lora_alpha 128 --lr 2e-3
answers lora
stage dpo "$PYTHON" dpo.py --init "$out/sft" --data "$out/demo/dpo.jsonl" --out "$out/dpo" \
    "${tune[@]}" --val 200 --epochs 2 --lr 4e-5 --beta 2
answers dpo
# the same model in 8 and in 4 bits
stage int8 "$PYTHON" quantize.py "$out/dpo" --bits 8 --head_bits 8 --out "$out/int8"
stage int4 "$PYTHON" quantize.py "$out/dpo" --head_bits 8 --out "$out/int4" \
    --calibrate "$out/clean" --calibrate_tokens 16384
stage formats "$PYTHON" bench.py formats "$out/dpo" "$out/int8" "$out/int4" \
    --text "$out/clean" --exam "$out/demo/exam"
grep 'perplexity\|tokens/s' "$out/formats.log"
answers int4
head -n 3 "$out/int4-answers.log"
echo "${summary}$((SECONDS - begin)) s in all, budget $budget"
echo "go on: .venv/bin/python generate.py $out/dpo --ask '介绍一下你自己。'"
