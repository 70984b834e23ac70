"""Everything to be seen on a GPU, in one go: checks, speed, and two phases of training.

    python -m extras.gpu --data DIR --tokenizer DIR --out DIR [--minutes 9]

--data is a folder with train.txt, valid.txt and test.txt (captions), --tokenizer a T5 tokenizer.
In this order, each into a log file of its own in --out, until the time is over:

1. `pytest extras/test_gpu.py`: runs in each precision, resuming, synchronizations per step;
2. `extras.benchmark` with t5-small's shape and then t5-base's, in float32, bf16 and fp16, against a
   plain transformers step;
3. both phases of training with t5-small's shape;
4. the benchmark of t5-small's shape with torch.compile, which takes minutes to compile.

No GPU has run it yet: none was lent. Weights are random, of the real shapes.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"t5-small": (512, 8, 6), "t5-base": (768, 12, 12)}  # width, heads, layers


def commands(data, tokenizer, out, limit):
    """Yields (name, arguments of python)."""
    yield "checks", ["-m", "pytest", "extras/test_gpu.py", "-rs"]
    for name, (width, heads, layers) in SHAPES.items():
        shape = ["--d-model", width, "--heads", heads, "--layers", layers]
        made = ["--tokenizer", tokenizer, "--steps", 0, "--resume", "--out", out / name]
        yield f"{name}-make", ["-m", "extras.pretrain", "--dataset", data, *shape, *made]
        for amp in ("off", "bf16", "fp16"):
            flags = ["--dataset", data, "--model", out / name / "model", "--amp", amp]
            yield f"{name}-{amp}", ["-m", "extras.benchmark", *flags]
    model = ["--model", out / "t5-small" / "model", "--epochs", 1, "--limit", limit]
    model += ["--kl-target", 8, "--iw-samples", 10, "--resume"]
    yield (
        "train",
        ["train.py", "--dataset", data, "--recipe", "best", *model, "--out", out / "runs"],
    )


def main(argv=None):
    parser = argparse.ArgumentParser("gpu.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data", required=True, help="folder with train.txt, valid.txt and test.txt")
    flag("--tokenizer", required=True, help="folder of a T5 tokenizer")
    flag("--out", required=True, type=Path, help="folder for logs and runs")
    flag("--minutes", type=float, default=9.0, help="of all commands together (9)")
    flag("--limit", type=int, default=40_000, help="training texts (40000)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    for name, words in commands(args.data, args.tokenizer, args.out, args.limit):
        started, left = time.monotonic(), ends - time.monotonic()
        if left < 5:
            print(f"{name}: not run, the time is over")
            continue
        with open(args.out / f"{name}.log", "w") as log:
            command = [sys.executable, *map(str, words)]
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=left).returncode
            except subprocess.TimeoutExpired:
                code = "cut off"
        print(f"{name}: {code}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
