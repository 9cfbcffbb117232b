"""Entry: metrics of sampled text, as in the paper's Tables 6 and 7.

    python -m bd3lm_scale.evaluate_generations SAMPLES.jsonl... [--judge gpt2-large]

Reads what `bd3lm_scale.sample` wrote (or any JSON lines with a field "text") and writes SAMPLES.evaluation.json beside
each file: generative perplexity and entropy by a local judge, NFE, forward calls, median and greatest length.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bd3lm_scale.evaluation.judge import DTYPES, Judge, JudgedText, JudgeMissing, judge_texts, load_judge, windows

SUFFIX = ".evaluation.json"
_COPIED_FIELDS = ("sampler", "length", "step", "objective", "block_size", "nucleus_p", "stop_at_eos")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a JSON-lines file.

    Raises:
        ValueError: a line that is no JSON object with "text", or no line at all; names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with: python -m bd3lm_scale.sample RUN --output {path}")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}, line {number}: not JSON ({problem.msg}); remove the line") from problem
        if not isinstance(sample, dict) or not isinstance(sample.get("text"), str):
            raise ValueError(
                f'{path}, line {number}: no field "text"; each line is an object such as {{"text": "..."}}'
            )
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: holds no samples")
    return samples


def summarize(samples: Sequence[dict[str, Any]], judged: Sequence[JudgedText] | None) -> dict[str, Any]:
    """Figures over samples; those that nothing is known about are left out.

    `gen_ppl` is the mean over samples of each one's perplexity, as published; `gen_ppl_pooled` weighs tokens equally.
    """
    metrics: dict[str, Any] = {"num_samples": len(samples)}
    metrics |= {
        key: samples[0][key]
        for key in _COPIED_FIELDS
        if len({repr(s.get(key)) for s in samples}) == 1 and key in samples[0]
    }
    for field, name in (("nfe", "nfe"), ("forward_calls", "forward_calls")):
        values = [s[field] for s in samples if isinstance(s.get(field), int | float)]
        if values:
            metrics[name] = statistics.fmean(values)
    lengths = [s["num_tokens"] for s in samples if isinstance(s.get("num_tokens"), int)]
    if lengths:
        metrics |= {
            "length_median": statistics.median(lengths),
            "length_max": max(lengths),
            "length_mean": statistics.fmean(lengths),
        }
    ends = Counter(s["finish"] for s in samples if "finish" in s)
    if ends:
        metrics["finish"] = dict(sorted(ends.items()))
    return metrics | _judged_metrics(judged or [])


def _judged_metrics(judged: Sequence[JudgedText]) -> dict[str, Any]:
    scored = [text for text in judged if text.num_scored]
    if not scored:
        return {}
    perplexities = [text.perplexity for text in scored]
    pooled = math.fsum(t.nll for t in scored) / sum(t.num_scored for t in scored)
    stderr = statistics.stdev(perplexities) / math.sqrt(len(perplexities)) if len(perplexities) > 1 else None
    return {
        "gen_ppl": statistics.fmean(perplexities),
        "gen_ppl_stderr": stderr,
        "gen_ppl_median": statistics.median(perplexities),
        "gen_ppl_pooled": math.exp(pooled),
        "entropy": statistics.fmean(text.entropy for text in scored),
        "num_judged": len(scored),
        "num_unscored": len(judged) - len(scored),
    }


def judge_text(sample: dict[str, Any], judge: Judge) -> str:
    """A sample's text with its own end-of-text mark written as the judge's."""
    mark = sample.get("end_of_text")
    return sample["text"].replace(mark, judge.eos_token or "") if mark else sample["text"]


def evaluate_file(path: Path, judge: Judge | None, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one file, written beside it."""
    samples = read_samples(path)
    judged = None
    if judge is not None:
        texts = [judge_text(sample, judge) for sample in samples]
        limits = [args.max_tokens or sample.get("length") for sample in samples]
        lengths = [len(judge.encode(text)[:limit]) for text, limit in zip(texts, limits, strict=True)]
        total = sum(len(windows(n, args.context, args.stride)) for n in lengths if n > 1)
        with tqdm(total=total, desc=f"judging {path.name}", unit="window", disable=not sys.stderr.isatty()) as bar:
            judged = judge_texts(
                judge,
                texts,
                max_tokens=limits,
                context=args.context,
                stride=args.stride,
                batch_size=args.batch_size,
                on_progress=bar.update,
            )
    metrics = {"samples": path.name, **summarize(samples, judged)}
    if judge is not None:
        metrics |= {"judge": judge.name, "judge_context": args.context, "judge_stride": args.stride}
    output = path.with_name(path.name.removesuffix(".jsonl") + SUFFIX)
    output.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bd3lm_scale.evaluate_generations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("samples", nargs="+", type=Path, metavar="SAMPLES.jsonl")
    parser.add_argument("--judge", default="gpt2-large", help="folder or cached name of a causal model; none: skip it")
    parser.add_argument("--context", type=int, default=1024, help="window of the judge, in its tokens")
    parser.add_argument("--stride", type=int, default=512, help="how far windows move")
    parser.add_argument("--max-tokens", type=int, help="truncate texts (default: the length each sample was asked for)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per forward pass")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the judge")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate each file and print its metrics."""
    import torch

    args = _arguments(argv)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        judge = None if args.judge == "none" else load_judge(args.judge, device, args.precision)
        for path in args.samples:
            for key, value in evaluate_file(path, judge, args).items():
                print(f"{key:<15} {value:,.4f}" if isinstance(value, float) else f"{key:<15} {value}")
    except (JudgeMissing, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0
