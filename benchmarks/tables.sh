#!/usr/bin/env bash
# Makes the tables of the package (docs/tables.md). DATA has a folder per data set with train.jsonl and validation.jsonl, MINILM is
# all-MiniLM-L6-v2. Mixed precision was bf16, and none for the Pegasus. Usage: DATA=... MINILM=... benchmarks/tables.sh
set -euo pipefail

sd-gym tabulate SD/Summarization-Mini-v0 --output envs_configs/tables/summarization-mini --decisions path \
  --decisions codebook --decisions random:32 --instances 2000 --pca 32 --share

trec=(--set "dataset=$DATA/trec" --set max_source_length=32 --set overlap=drop
      --set "splits={train: 'train[:3652]', validation: 'train[3652:]', test: validation}")
agnews=(--set "dataset=$DATA/agnews" --set max_source_length=32 --set overlap=drop
        --set "splits={train: 'train[:7001]', validation: 'train[7001:]', test: validation}")
snli=(--set "dataset=$DATA/snli" --set max_source_length=48 --set overlap=drop
      --set "splits={train: train, validation: 'validation[:2413]', test: 'validation[2413:]'}")
prepare=(sd-gym prepare --backbone "$MINILM" --env SD/Classification-Custom-v0 --learning-rate 2e-4)
tabulate=(sd-gym tabulate SD/Classification-Custom-v0 --share --bf16 --pca 64)
"${prepare[@]}" --output minilm-trec --rows 2400 --steps 600 --max-rate 0.7 "${trec[@]}"
"${prepare[@]}" --output minilm-agnews --rows 5000 --steps 500 --max-rate 0.7 "${agnews[@]}"
"${prepare[@]}" --output minilm-snli --rows 6000 --steps 650 --max-rate 0.6 "${snli[@]}"
"${tabulate[@]}" --output table-trec --set backbone=minilm-trec "${trec[@]}"
"${tabulate[@]}" --output table-trec-staged --decisions path --set backbone=minilm-trec --pca 32 \
  --set "stages=[first, encoder.3, answer]" "${trec[@]}"
"${tabulate[@]}" --output table-agnews --decisions layers --set backbone=minilm-agnews "${agnews[@]}"
"${tabulate[@]}" --output table-snli --decisions layers --set backbone=minilm-snli "${snli[@]}"

qamr=(--set "dataset=$DATA/qamr" --set overlap=drop --set max_source_length=96 --set unanswerable=false --set metric=squad
      --set quality=metric --set answers=extracted
      --set "splits={train: 'train[:16500]', validation: 'train[16500:]', test: validation}")
how=(--env SD/QuestionAnswering-Custom-v0 --rows 1 --steps 450 --max-rate 0.6 --set validation_size=500)
sd-gym prepare --backbone "$MINILM" --output minilm-qamr-1 --learning-rate 3e-4 "${how[@]}" "${qamr[@]}"
sd-gym prepare --backbone minilm-qamr-1 --output minilm-qamr --learning-rate 2e-4 "${how[@]}" "${qamr[@]}"
sd-gym tabulate SD/QuestionAnswering-Custom-v0 --output envs_configs/tables/question-answering-qamr --decisions path \
  --decisions random:24 --pca 32 --share --set backbone=minilm-qamr --set policy_rows=all "${qamr[@]}" \
  --set train_size=2000 --set validation_size=1000 --set test_size=2000

rnnlg=(--set overlap=drop --set max_source_length=64 --set max_target_length=48 --set quality=likelihood)
prepare=(sd-gym prepare --env SD/Summarization-Custom-v0 --rows 8500 --draw layers --max-rate 0.6 --set train_size=11500
         --set "splits={train: 'train[:15500]', validation: 'train[15500:]', test: 'validation[:2500]'}"
         --set "dataset=$DATA/rnnlg" "${rnnlg[@]}")
python benchmarks/generator.py --tokenizer "$MINILM" --data "$DATA/rnnlg" --output pegasus
"${prepare[@]}" --backbone pegasus --output pegasus-rnnlg-1 --steps 1300 --learning-rate 1e-3
"${prepare[@]}" --backbone pegasus-rnnlg-1 --output pegasus-rnnlg --steps 2600 --learning-rate 8e-4
mkdir -p rnnlg-unique  # the first row of each dialogue act, so that the splits are alike
awk -F'"document": "|", "summary"' '!seen[$2]++' "$DATA/rnnlg/train.jsonl" > rnnlg-unique/train.jsonl
# The masks skip the layers of each stack that matter least (importance in preparation.json), of either stack 0 to 4.
sd-gym tabulate SD/Summarization-Custom-v0 --output table-rnnlg --decisions codebook:envs_configs/tables/summarization-rnnlg/codebook.json \
  --instances 2500 --pca 64 --share --references --set backbone=pegasus-rnnlg --set dataset=rnnlg-unique "${rnnlg[@]}" \
  --set "splits={train: 'train[:10540]', validation: 'train[10540:12290]', test: 'train[12290:]'}"
