#!/usr/bin/env bash
# Three tokenisations of one text, compared:  bash scripts/tokenizations.sh BENCHMARKS [key=value …]
#
# Makes Filipino-like text, trains SmolLM2-135M on it as it is, with StochasTok and with Patok (configs/smollm2_135m_cpt.yaml), and compares the
# three on the benchmarks in the folder BENCHMARKS. What is there already is not made again. LIMIT=100: so many problems of each.
set -euo pipefail
cd "$(dirname "$0")/.."
benchmarks=${1:?name the folder of the benchmarks: docs/eval.md}
shift
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
  if [ -e "$folder/config.yaml" ]; then
    "$fasttune" train --resume "$folder"
  else
    "$fasttune" train configs/smollm2_135m_cpt.yaml "${settings[@]}" "$@"
  fi
done
"$fasttune" eval "${folders[@]}" --tasks filipino --data "$benchmarks" ${LIMIT:+--limit "$LIMIT"} --out runs/tokenizations/compared
