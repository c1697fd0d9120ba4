"""`prunewise demo`: the main job from beginning to end on real data, in under two minutes."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunewise.cli.options import UsageError, count, require_folder, share
from prunewise.cli.output import as_share, print_json, print_line, print_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunewise import GateSession
    from prunewise.cli.digits import Digits

HELP = "train a small network on handwritten digits, halve its MACs, check and time the result"

BATCH_SIZE = 64
TOLERANCE = 1e-4  # float32; largest difference of logits, relative to the largest logit

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--macs", type=share(zero=False), default=0.5, help="share of the MACs to keep (%(default)s)")
    parser.add_argument("--epochs", type=count(1), default=12, help="epochs of each of the two trainings (%(default)s)")
    parser.add_argument(
        "--seed", type=count(0), default=0, help="of the split, the weights and the batches (%(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="folder (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Train, gate, cut, check, save, load, time, print."""
    require_folder(args.out)
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError("the demo's data needs scikit-learn: pip install 'prunewise[demo]'") from None

    result = run_demo(macs=args.macs, epochs=args.epochs, seed=args.seed, out=args.out)
    (args.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print_json(result)
        return
    before, after = result["before"], result["after"]
    rows = [
        [label, style.format(before[key]), style.format(after[key]), as_share(after[key], before[key])]
        for label, key, style in (
            ("MACs", "macs", "{:,}"),
            ("parameters", "params", "{:,}"),
            ("test accuracy, %", "accuracy_percent", "{:.2f}"),
            ("latency, batch 1, ms", "latency_ms_batch_1", "{:.3f}"),
            ("latency, batch 32, ms", "latency_ms_batch_32", "{:.3f}"),
        )
    ]
    print_table("scikit-learn digits, a small ResNet, one CPU thread", ["", "before", "after", "share"], rows)
    check = result["check"]
    print_line(
        f"small equals gated on {check['samples']} test images: {check['correct_small']} correct with both, "
        f"largest difference of a logit {check['max_abs_difference']:.1e}"
    )
    for name in result["files"]:
        print_line(f"  {args.out / name}")


def run_demo(macs: float, epochs: int, seed: int, out: Path) -> dict[str, Any]:
    """The whole job; returns what was measured. Raises `VerificationError` where small and gated model differ."""
    import torch

    import prunewise as pw
    from prunewise.cli.digits import DigitsResNet, load_digits
    from prunewise.cli.timing import median_latency_ms

    started = time.perf_counter()
    torch.set_num_threads(1)  # more threads slow a network this small down
    torch.manual_seed(seed)
    data = load_digits(seed)
    example = data.test_images[:1]

    model = DigitsResNet()
    _train(model, data, epochs, lr=0.05)
    accuracy_before = 100 * _correct(model, data) / len(data.test_targets)
    log.info("trained: %.2f %% of the test images right", accuracy_before)
    original = DigitsResNet().eval()
    original.load_state_dict(model.state_dict())

    gates = pw.attach_gates(model, example, budget=pw.Budget(macs=macs), total_steps=epochs * _steps_per_epoch(data))
    _train(model, data, epochs, lr=0.02, gates=gates)
    plan = gates.harden()
    gated_logits = _test_logits(model, data)
    small = gates.finish().eval()
    check = _compare(gated_logits, _test_logits(small, data), data.test_targets, "the gated model")
    log.info("gates closed and cut")

    pw.save_pruned(out, small, plan)
    loaded = pw.load_pruned(out, DigitsResNet).eval()
    _compare(_test_logits(small, data), _test_logits(loaded, data), data.test_targets, "the one that was saved")

    result: dict[str, Any] = {"seed": seed, "epochs": epochs, "check": check}
    for when, each in (("before", original), ("after", loaded)):
        cost = pw.measure(each, example)
        accuracy = 100 * _correct(each, data) / len(data.test_targets)
        result[when] = {"macs": cost.macs, "params": cost.params, "accuracy_percent": accuracy}
    for batch_size in (1, 32):
        latency_ms = median_latency_ms({"before": original, "after": loaded}, data.test_images[:batch_size])
        for when, value in latency_ms.items():
            result[when][f"latency_ms_batch_{batch_size}"] = round(value, 4)
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["files"] = ["plan.json", "model.safetensors", "demo.json"]
    return result


def _train(model: nn.Module, data: Digits, epochs: int, lr: float, gates: GateSession | None = None) -> None:
    import torch
    from torch.nn import functional as F

    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": 5e-4}]
    if gates is not None:
        gate_parameters = list(gates.parameters())
        known = {id(p) for p in gate_parameters}
        groups[0]["params"] = [p for p in model.parameters() if id(p) not in known]
        groups.append({"params": gate_parameters, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * _steps_per_epoch(data))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_targets)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_targets[batch])
            if gates is not None:
                loss = loss + gates.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if gates is not None:
                gates.step()


def _steps_per_epoch(data: Digits) -> int:
    return -(-len(data.train_targets) // BATCH_SIZE)


def _test_logits(model: nn.Module, data: Digits) -> Tensor:
    import torch

    model.eval()
    with torch.inference_mode():
        logits: Tensor = model(data.test_images)
    return logits


def _correct(model: nn.Module, data: Digits) -> int:
    return int((_test_logits(model, data).argmax(1) == data.test_targets).sum())


def _compare(expected: Tensor, found: Tensor, targets: Tensor, whose: str) -> dict[str, Any]:
    """Equal logits to rounding and equal hits to the sample, or `VerificationError`."""
    from prunewise.core.errors import VerificationError

    difference = float((expected - found).abs().max())
    hits_expected, hits_found = expected.argmax(1) == targets, found.argmax(1) == targets
    differing = int((hits_expected != hits_found).sum())
    if differing or not difference <= TOLERANCE * float(expected.abs().max()):
        raise VerificationError(
            f"the model differs from {whose}: {differing} of {len(targets)} test images, "
            f"logits by up to {difference:.2e}. Please report this with the version and the seed."
        )
    return {
        "samples": len(targets),
        "correct_gated": int(hits_expected.sum()),
        "correct_small": int(hits_found.sum()),
        "max_abs_difference": difference,
    }
