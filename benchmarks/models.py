"""One table of models: throughput, size, cost and published AP of everything that exists here, by one command.

    python -m benchmarks.models [--device auto] [--batch 64] [--seconds 10] [--only NAME ...] [--clock wall]
        [--out FILE] [--note TEXT]

Throughput is that of the forward alone, without the mirror image, on random images in float32, after a warm-up: the
method of ViTPose's table 9.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.zoo import MODELS, Entry
from pipeline.files import write_json
from pipeline.models.config import PoseConfig
from pipeline.models.cost import pose_cost
from pipeline.models.pose import PoseModel, describe

KEYPOINTS = {"coco": 17}
REPEATS = 5
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def size_and_cost(config: PoseConfig) -> dict[str, float]:
    """Parameters, and multiply-adds of one image in units of 10^9."""
    macs = sum(pose_cost(config, KEYPOINTS["coco"]))
    return {"parameters": describe(config, KEYPOINTS)["total"], "gmacs": macs / 1e9}


@torch.inference_mode()
def throughput(
    config: PoseConfig, device: torch.device, batch: int, seconds: float, clock: str = "wall"
) -> dict[str, float]:
    """Images per second of the forward: median, least and most of `REPEATS` repeats, `seconds` in all, and the batches.

    A repeat is as many batches as fit into its share of the time, at least one.
    """
    torch.manual_seed(0)
    model = PoseModel(config, KEYPOINTS)
    model.init_weights()
    model.to(device).eval()
    images = torch.randn(batch, 3, *config.backbone.image_size, device=device)
    read = CLOCKS[clock]
    once = min(_seconds(model, images, 1, read) for _ in range(2))  # also the warm-up
    batches = max(1, int(seconds / REPEATS / once))
    rates = [batch * batches / _seconds(model, images, batches, read) for _ in range(REPEATS)]
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates), "batches": REPEATS * batches}


def _seconds(model: PoseModel, images: torch.Tensor, batches: int, clock: Callable[[], float]) -> float:
    synchronise = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    synchronise()
    start = clock()
    for _ in range(batches):
        model(images)
    synchronise()
    return clock() - start


def markdown(result: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Models",
        "",
        "Written by `python -m benchmarks.models`; [benchmarks](../benchmarks/README.md) says how. Input 256x192, the",
        "decoder of COCO's 17 keypoints. AP is published, on COCO val2017: nothing here was trained by us.",
        "",
        f"Measured on {result['date']}: {result['machine']}, batch {result['batch']}, float32, forward only,",
        f"by {'the clock' if result['clock'] == 'wall' else 'CPU seconds, not by the clock'}.",
        *([f"{result['note']}"] if result["note"] else []),
        "",
        "| model | parameters | GMACs | images/s here | published images/s | published AP | source of the AP | AP, several |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in result["rows"]:
        here = f"{row['throughput']['median']:.2f}" if row["throughput"] else "not run"
        there = f"{row['published_images_per_second']:.0f}" if row["published_images_per_second"] else "-"
        ap = f"{row['published_ap']:.1f}" if row["published_ap"] else "-"
        size = f"{row['parameters'] / 1e6:,.1f}M | {row['gmacs']:.2f}"
        several = f"{row['published_ap_several']:.1f}" if row["published_ap_several"] else "-"
        lines.append(f"| `{row['name']}` | {size} | {here} | {there} | {ap} | {row['source']} | {several} |")
    return "\n".join([*lines, "", *_NOTES, ""])


_NOTES = (
    "AP, several: published, after training on COCO, AI Challenger and MPII (ViTPose, table 9). A ViTPose+ model of one",
    "dataset is the plain ViT of its size, so its cost is that row's.",
    "Published images per second are those of one A100 at batch 64 (ViTPose, table 9). ViTPose's table 2 gives its own",
    "ResNets 71.8 (50) and 73.5 (152) AP with the classic decoder; the lower figures above are of SimpleBaseline's code.",
    "`1b` is a plain ViT-g, not the paper's ViTAE-G, so no published figure is its own.",
)


def measure(entry: Entry, device: torch.device | None, batch: int, seconds: float, clock: str) -> dict[str, Any]:
    """A row; device None leaves the throughput out."""
    return {
        "name": entry.name,
        **size_and_cost(entry.model),
        "throughput": throughput(entry.model, device, batch, seconds, clock) if device else None,
        "published_ap": entry.ap,
        "source": entry.source,
        "published_ap_several": entry.ap_several,
        "published_images_per_second": entry.images_per_second,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, and writes it where asked."""
    options = _parser().parse_args(arguments)
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if options.clock == "cpu" and device.type != "cpu":
        raise SystemExit("--clock cpu: a GPU's work takes no CPU seconds; use the wall clock")
    rows = []
    for entry in MODELS:
        chosen = options.only is None or entry.name in options.only
        row = measure(entry, device if chosen else None, options.batch, options.seconds, options.clock)
        rows.append(row)
        if row["throughput"]:
            print(f"{entry.name}: {row['throughput']['median']:.2f} images/s", file=sys.stderr, flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "batch": options.batch,
        "seconds": options.seconds,
        "clock": options.clock,
        "note": options.note,
        "rows": rows,
    }
    print(markdown(result))
    if options.out:
        write_json(options.out, result)
        options.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    parser.add_argument("--batch", type=_positive, default=64, help="images per forward (64)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring a model, warm-up not counted (10)")
    clocks = "wall, or cpu: the process's CPU seconds, for a CPU that is shared with other work"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=clocks)
    names = [entry.name for entry in MODELS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"models to time: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="a .json file; the table goes beside it as .md")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else ran on the machine")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
