#!/usr/bin/env bash
# From photos to a page in the browser, with two adapters side by side: a folder per class in photos/, and
#
#     pip install -e ".[finetune,serve]"
#     bash examples/photos_to_page.sh photos/ vit_small_patch16_224 weights.safetensors runs/
#
# All that is written is in the folder that comes last. The weights are a checkpoint of this model of timm's, such as
#     python -c "import timm, torch; torch.save(timm.create_model('vit_small_patch16_224', True).state_dict(), 'w.pt')"
# More arguments go to both runs: --epochs 20, say.
set -euo pipefail
photos=$1 model=$2 weights=$3 out=$4
mkdir -p "$out/adapters"

efft-finetune --data "$photos" --out "$out/photos" --model "$model" --checkpoint "$weights" "${@:5}"
efft-finetune --data "$photos" --out "$out/smaller-lr" --model "$model" --checkpoint "$weights" --lr 3e-4 "${@:5}"
efft-finetune compare "$out/photos" "$out/smaller-lr" --out "$out/compared.html"
efft-finetune predict "$out/photos" "$photos" --out "$out/labels.csv"
efft-finetune export "$out/photos" --to lora --out "$out/lora"

cp "$out/photos/adapter.safetensors" "$out/adapters/photos.safetensors"
cp "$out/smaller-lr/adapter.safetensors" "$out/adapters/smaller-lr.safetensors"
# each run has its report in report.html; the page is http://127.0.0.1:8000/
python -m efft_kernels.serving --model "$model" --weights "$weights" --adapters "$out/adapters"
