"""Flipped labels on scikit-learn's digits: how well one recorded training finds them.

A share of the labels is flipped, to a random other class (symmetric) or to one fixed other class (asymmetric: c to c + 1). A
small network is trained once on what results, recorded; its scores rank the samples, and `pw.suspects` sets its own threshold.
Nothing is chosen by the true labels.

    python benchmarks/label_noise.py [--noise 0.2 0.4] [--seeds 3] [--epochs 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunewise as pw

RANKINGS = ("learnability", "forgetting", "aum", "aum_softmax", "el2n", "confidence", "loss")
CLASSES = 10


def flipped(labels: np.ndarray, share: float, kind: str, seed: int) -> np.ndarray:
    """The labels with `share` of them wrong."""
    random = np.random.default_rng(seed + 1000)
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    step = random.integers(1, CLASSES, len(wrong)) if kind == "symmetric" else 1
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + step) % CLASSES
    return noisy


def train(x: torch.Tensor, labels: np.ndarray, epochs: int, seed: int) -> tuple[pw.SampleScores, float]:
    """Scores of one recorded training, and its seconds."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    tracked = pw.track(TensorDataset(x, torch.as_tensor(labels)))
    loader = DataLoader(tracked, batch_size=64, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    recorder = pw.LearnabilityRecorder(len(tracked))
    start = time.perf_counter()
    for _ in range(epochs):
        for inputs, targets, sample_ids in loader:
            logits = model(inputs)
            recorder.update(sample_ids, logits, targets)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            schedule.step()
    return recorder.scores(labels, model="mlp", seed=seed), time.perf_counter() - start


def measures(scores: pw.SampleScores, noisy: np.ndarray, clean: np.ndarray) -> dict[str, Any]:
    """How well the scores rank the wrong labels, and what `suspects` makes of them."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    wrong = noisy != clean
    found = pw.suspects(scores, noisy)
    named = np.zeros(len(wrong), bool)
    named[found.number] = True
    hits = int((named & wrong).sum())
    proposed = clean[found.number] == found.proposed_label
    return {
        "auroc": {by: round(float(roc_auc_score(wrong, scores.difficulty(by))), 4) for by in RANKINGS},
        "auprc": {by: round(float(average_precision_score(wrong, scores.difficulty(by))), 4) for by in RANKINGS},
        "suspects": {
            "auroc": round(float(roc_auc_score(wrong, found.all_scores)), 4),
            "auprc": round(float(average_precision_score(wrong, found.all_scores)), 4),
            "found": len(found),
            "estimated_count": found.estimated_count,
            "true_count": int(wrong.sum()),
            "precision": round(hits / max(1, len(found)), 4),
            "recall": round(hits / max(1, int(wrong.sum())), 4),
            "proposed_label_right": round(float(proposed[wrong[found.number]].mean()), 4) if hits else None,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.4])
    parser.add_argument("--kinds", nargs="+", default=["symmetric", "asymmetric"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where the results go (default: printed only)")
    args = parser.parse_args()
    from bench import circumstances, table
    from sklearn.datasets import load_digits

    data, clean = load_digits(return_X_y=True)
    x = torch.as_tensor((data / 16).astype(np.float32))
    runs, rows = [], []
    for share in args.noise:
        for kind in args.kinds if share else args.kinds[:1]:
            for seed in range(args.seeds):
                noisy = flipped(clean, share, kind, seed)
                scores, seconds = train(x, noisy, args.epochs, seed)
                run = {"noise": share, "kind": kind, "seed": seed, "seconds": round(seconds, 2)}
                if share:
                    run |= measures(scores, noisy, clean)
                else:
                    run["suspects"] = {"found": len(pw.suspects(scores, noisy)), "true_count": 0}
                runs.append(run)
                s = run["suspects"]
                rows.append(
                    [share, kind, seed, *(run["auroc"][b] if share else "" for b in ("learnability", "aum")),
                     *(s.get(k, "") for k in ("auroc", "precision", "recall", "found", "estimated_count", "true_count",
                                              "proposed_label_right"))]
                )  # fmt: skip
    head = ["noise", "kind", "seed", "AUROC learnability", "AUROC aum", "AUROC suspects", "precision", "recall", "found",
            "estimated", "true", "proposed label right"]  # fmt: skip
    print(table(head, rows))
    if args.json:
        args.json.write_text(json.dumps({**circumstances(0), "results": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
