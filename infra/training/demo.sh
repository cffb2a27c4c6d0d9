#!/bin/sh
# Makes the demonstration checkpoint from nothing: infra/training/demo.sh OUT, from the project root, with assay on PATH.
# Hours on two cores (tests/benchmarks/README.md). Started again it goes on where it stopped.
# A small one, to see it work: SCENES=48 TUNING=16 MEASURED=60 PRETRAINING=config.yaml, with an OUT of its own. Thresholds
# are then refused, as of any checkpoint whose rewards do not rise with the labels.
set -eu
out=${1:?usage: infra/training/demo.sh OUT}
scenes=$out/scenes
taught=${SCENES:-4000} tuning=${TUNING:-250} measured=${MEASURED:-500}

python -m model.llava_reward.pretrain "$out/pretraining" --config "${PRETRAINING:-model/llava_reward/pretrain.yaml}"
python -m model.scene_preferences "$scenes" --split training --scenes $((taught + tuning))
for split in validation held_out; do
    python -m model.scene_preferences "$scenes" --split "$split" --scenes "$measured"
done

# Fidelity and safety learn from labels, four of each scene; half of the scenes are enough for these.
loss() { case $1 in fidelity | safety) echo cls ;; *) echo bt ;; esac; }
kind() { case $1 in fidelity | safety) echo labels ;; *) echo pairs ;; esac; }
for perspective in alignment fidelity safety overall; do
    records=$scenes/training/$(kind "$perspective")/$perspective
    case $perspective in fidelity | safety) first=$((taught / 2 * 4)) last=$((tuning * 4)) ;;
    *) first=$((taught * 2)) last=$((tuning * 2)) ;; esac
    head -n "$first" "$records.jsonl" > "$records-taught.jsonl"
    tail -n "$last" "$records.jsonl" > "$records-tuning.jsonl"
    assay train --local --config infra/training/demo.yaml --perspective "$perspective" --loss "$(loss "$perspective")" \
        --backbone "$out/pretraining/backbone" --image-root "$scenes" --output "$out/trained/$perspective" \
        --data "$records-taught.jsonl" --eval-data "$records-tuning.jsonl"
done

rm -rf "$out/demo"
mkdir "$out/demo"
cp -r "$out/pretraining/backbone" "$out/demo/"
set --
for perspective in alignment fidelity safety overall; do
    cp -r "$out/trained/$perspective/$perspective" "$out/demo/"
    cp "$out/trained/$perspective/MODEL_CARD.md" "$out/demo/$perspective/"
    set -- "$@" --adapter "$perspective=$out/demo/$perspective" --head-training "$perspective=$(loss "$perspective")"
done
assay bundle "$out/demo" --backbone "$out/demo/backbone" --num-crops 4 --name demo --licence Apache-2.0 "$@"
python -m model.llava_reward.golden_file "$out/demo"
for split in validation held_out; do
    for data in pairs/alignment pairs/fidelity labels/fidelity pairs/safety labels/safety pairs/overall; do
        assay evaluate --scorer "$out/demo" --perspective "${data#*/}" --image-root "$scenes" \
            --data "$scenes/$split/$data.jsonl" --out "$out/evaluation/$split-$data"
    done
done
# The thresholds of infra/policies/default.yaml.
for rule in safety:0.2:medium fidelity:0.2:medium overall:0.2:low alignment:0.2:low; do
    perspective=${rule%%:*} rest=${rule#*:}
    assay calibrate --scorer "$out/demo" --perspective "$perspective" --image-root "$scenes" --one-per-prompt \
        --data "$scenes/validation/labels/$perspective.jsonl" --alpha "${rest%:*}" --delta 0.1 --severity "${rest#*:}" \
        --out "$out/calibration/$perspective"
done
