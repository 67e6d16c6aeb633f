#!/usr/bin/env bash
# Three tokenisations of one text, compared:  bash scripts/tokenizations.sh BENCHMARKS [key=value …]
#
# Makes Filipino-like text, trains SmolLM2-135M on it as it is, with StochasTok and with Patok (configs/smollm2_135m_cpt.yaml), and compares the
# three on the benchmarks in the folder BENCHMARKS. Everything goes to runs/tokenizations; what is there already is not made again, and what
# was interrupted is resumed. LIMIT=100 in front: so many problems of each, for a try; all of them take hours on a CPU.
set -euo pipefail
benchmarks=$(realpath "${1:?name the folder of the benchmarks: docs/eval.md}")
shift
[ -d "$benchmarks" ] || { echo "$benchmarks: no such folder; name that of the benchmarks: docs/eval.md" >&2; exit 2; }
cd "$(dirname "$0")/.."
fasttune=.venv/bin/fasttune
mkdir -p runs/tokenizations
text=runs/tokenizations/filipino.jsonl
[ -s "$text" ] || .venv/bin/python benchmarks/filipino_text.py --mb 2 --out "$text"
folders=()
for mode in vanilla stochastok patok; do
  folder=runs/tokenizations/$mode
  folders+=("$folder")
  settings=("name=$mode" "output_dir=$folder" "data.train=$text" "data.tokenization=$mode")
  [ "$mode" != patok ] || settings+=(data.affixes=filipino)
  if grep -qs '"status": "completed"' "$folder/run.json"; then
    echo "$folder is trained already; remove it to train it again, with other settings"
  elif [ -n "$(ls -A "$folder/checkpoints" 2>/dev/null)" ]; then
    "$fasttune" train --resume "$folder"
  else # nothing, or what a run without a checkpoint left
    "$fasttune" train configs/smollm2_135m_cpt.yaml "${settings[@]}" overwrite=true "$@"
  fi
done
"$fasttune" eval "${folders[@]}" --tasks filipino --data "$benchmarks" ${LIMIT:+--limit "$LIMIT"} --out runs/tokenizations/compared
