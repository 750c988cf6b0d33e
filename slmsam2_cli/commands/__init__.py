"""The pipeline, one file a verb. Stages meet through files in the workspace alone; none imports another.

dataset.json, images, labels
    │
    ├─ plan ────────▶ fingerprint.json, plan.json, plan.html     what the data are; every decision with its reason
    │                     │
    ├─ preprocess ◀───────┤
    │      └────────▶ prepared/<case>/                each labelled volume as a stack of slices
    │                     │
    ├─ finetune ◀─────────┤
    │      └────────▶ finetuned/                      model.safetensors (with its plan), split.json, log.csv
    │                     │
images, prompts           │
    │                     │
    ├─ predict ◀──────────┘
    │      └────────▶ MASKS/                          one mask a volume, manifest.json
    │                     │
    └─ evaluate ◀─────────┘
           └────────▶ evaluation/                     summary.json, cases.csv, slices.csv, summary.md
"""
