#!/usr/bin/env bash
# From photos to a page in the browser, with two adapters side by side: a folder per class in photos/, and
#
#     pip install -e ".[finetune,serve]"
#     bash examples/photos_to_page.sh photos/ vit_small_patch16_224 weights.safetensors
#
# The weights are a checkpoint of this model of timm's, for example
#     python -c "import timm, torch; torch.save(timm.create_model('vit_small_patch16_224', True).state_dict(), 'w.pt')"
# More arguments go to both runs: --epochs 20, say.
set -euo pipefail
photos=$1 model=$2 weights=$3

efft-finetune --data "$photos" --out runs/photos --model "$model" --checkpoint "$weights" "${@:4}"
efft-finetune --data "$photos" --out runs/smaller-lr --model "$model" --checkpoint "$weights" --lr 3e-4 "${@:4}"
efft-finetune compare runs/photos runs/smaller-lr --out compared.html
efft-finetune predict runs/photos "$photos" --out labels.csv
efft-finetune export runs/photos --to lora --out lora

mkdir -p adapters
cp runs/photos/adapter.safetensors adapters/photos.safetensors
cp runs/smaller-lr/adapter.safetensors adapters/smaller-lr.safetensors
# each run has its report in report.html; the page is http://127.0.0.1:8000/
python -m efft_kernels.serving --model "$model" --weights "$weights" --adapters adapters/
