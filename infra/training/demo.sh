#!/bin/sh
# Makes the demonstration checkpoint from nothing: infra/training/demo.sh OUT, from the project root, with assay on PATH.
# About two and a half hours on two cores. Started again it goes on where it stopped.
set -eu
out=${1:?usage: infra/training/demo.sh OUT}
scenes=$out/scenes

python -m model.llava_reward.pretrain "$out/pretraining"
python -m model.scene_preferences "$scenes" --split training --scenes 4000
for split in validation held_out; do
    python -m model.scene_preferences "$scenes" --split "$split" --scenes 500
done
# Artefacts and signs are learned from half of the scenes.
for half in pairs/fidelity:2000 labels/safety:8000; do
    data=$scenes/training/${half%:*}.jsonl
    head -n "${half#*:}" "$data" > "$data.half" && mv "$data.half" "$data"
done

for perspective in alignment fidelity safety overall; do
    case $perspective in safety) loss=cls kind=labels ;; *) loss=bt kind=pairs ;; esac
    assay train --local --config infra/training/demo.yaml --perspective "$perspective" --loss "$loss" \
        --backbone "$out/pretraining/backbone" --image-root "$scenes" --output "$out/trained/$perspective" \
        --data "$scenes/training/$kind/$perspective.jsonl" --eval-data "$scenes/held_out/$kind/$perspective.jsonl"
done

rm -rf "$out/demo" && mkdir "$out/demo" && cp -r "$out/pretraining/backbone" "$out/demo/"
for perspective in alignment fidelity safety overall; do
    cp -r "$out/trained/$perspective/$perspective" "$out/trained/$perspective/MODEL_CARD.md" "$out/demo/"
    mv "$out/demo/MODEL_CARD.md" "$out/demo/$perspective/"
done
assay bundle "$out/demo" --backbone "$out/demo/backbone" --num-crops 4 --name demo --licence Apache-2.0 \
    --adapter alignment="$out/demo/alignment" --adapter fidelity="$out/demo/fidelity" \
    --adapter safety="$out/demo/safety" --adapter overall="$out/demo/overall" \
    --head-training alignment=bt --head-training fidelity=bt --head-training safety=cls --head-training overall=bt
python -m model.llava_reward.golden_file "$out/demo"
for split in validation held_out; do
    for perspective in alignment fidelity safety overall; do
        assay evaluate --scorer "$out/demo" --perspective "$perspective" --image-root "$scenes" \
            --data "$scenes/$split/pairs/$perspective.jsonl" --out "$out/evaluation/$split-$perspective"
    done
done
# The thresholds of infra/policies/default.yaml.
for rule in safety:0.2:medium fidelity:0.2:medium overall:0.2:low alignment:0.4:low; do
    perspective=${rule%%:*} rest=${rule#*:}
    assay calibrate --scorer "$out/demo" --perspective "$perspective" --image-root "$scenes" --one-per-prompt \
        --data "$scenes/validation/labels/$perspective.jsonl" --alpha "${rest%:*}" --delta 0.1 --severity "${rest#*:}" \
        --out "$out/calibration/$perspective"
done
