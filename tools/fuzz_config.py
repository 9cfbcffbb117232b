#!/usr/bin/env python3
"""Feed the configuration loader random documents and overrides; anything but a run or a clear refusal is a failure.

    tools/fuzz_config.py [--cases 10000] [--seed 1]

A case is a YAML text, overrides and a number of processes. It must be loaded and summarized, or refused by a
ConfigError whose every line names what is wrong and a remedy, within a second of processor time. Prints what failed,
each with the case that reproduces it, and ends with 1 if anything did.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bd3lm_scale.config.fields import field_names, field_rules
from bd3lm_scale.config.load import load_config, to_yaml
from bd3lm_scale.config.summary import dry_run
from bd3lm_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
SECONDS = 1.0
REMEDIES = ("use ", "did you mean", "correct ", "write ")

SCALARS = (
    "1", "0", "-1", "3", "7", "16", "1e6", "1e-3", "0.5", "1.5", "-0.0", ".inf", "-.inf", ".nan", "1e999", "1e-999",
    "010", "08", "0x10", "0b11", "0o17", "1_000", "1:30", "1:30.5", "190:20:30", "true", "false", "yes", "no", "on",
    "off", "Y", "null", "~", "", "abc", "10k", "5%", "1,000", "''", "'5'", '"a b"', "2024-01-01", "2001-01-01 00:00:00",
    "[]", "{}", "[1]", "{a: 1}", "[0.5, 0.6]", "[[1]]", "[a, {b: c}]", "{path: a}", "[{path: a, weight: 2}]", "???",
    "[{path: a, wight: 2}]", "${oc.env:HOME}", "${", "${optim.lr}", "$", "\\", "a\\nb", '"a\\nb"', '"\\0"', '"\\e[31m"',
    "!!int x", "!!bool 3", "!!float abc", "!!str 5", "!!null x", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]",
    "!!timestamp x", "!!python/object/apply:os.system [x]", "!local x", "! x", "&a [*a]", "&a 5", "*a", "<<: 3", "=",
    "<<", "%", "@x", "`x`", "- 1", "? a", "a: b: c", "|", ">", "# x", "---", "...", "\t", "\u2028", "\ufeff", "\ud800",
    "9" * 30, "9" * 400, "9" * 5000, "-" + "9" * 400, "1" + "0" * 309, "0." + "3" * 400, "1000000000", "999999999",
    "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e18", "1e300", "1e308",
    "[" * 40, "{a: " * 40, "[" * 3000, "[" * 20 + "]" * 20, "x" * 500, "'" + "x" * 5000 + "'", "é", "日本",
    "\U0001f600",
)  # fmt: skip
NAMES = (
    "", ".", "..", "a", "a.b.c", "data", "data.", ".data", "data..path", "data.path.x", "data.mixture[0].weight",
    "data.mixture.0.weight", "data.mixture[999999].path", "data.mixture[-1]", "data.mixture[x]", "[0]", "optim[0]",
    "diffusion.clip_search", "diffusion.clip_search.widths[1]", "diffusion.clip_search.widths", "train.stepz", "0", "~",
    "run dir", "run-dir", "__class__", "train.__init__", "model.layers", "é", "${a}", "a=b", "x" * 3000, "-x", "--help",
)  # fmt: skip
SIZES = (1, 2, 3, 4, 7, 8, 12, 16, 64, 100, 127, 128, 1000, 1024, 4096, 9973, 10_000, 65_536, 99_991, 999_983, 10**6)
HUGE = (10**6 + 3, 999_999_937, 10**9)


@dataclass(frozen=True)
class Case:
    """One input: the text of a file, overrides, number of processes (None: the smallest)."""

    kind: str
    text: bytes
    overrides: tuple[str, ...]
    world_size: int | None


def cases(seed: int) -> Iterator[Case]:
    """An endless stream, the same for the same seed."""
    random_ = random.Random(seed)
    documents = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]
    makers: tuple[Callable[[random.Random, list[str]], Case], ...] = (
        _overrides, _replaced_values, _damaged_bytes, _structures, _sizes,
    )  # fmt: skip
    while True:
        yield random_.choice(makers)(random_, documents)


def _overrides(random_: random.Random, documents: list[str]) -> Case:
    """A sound file under hostile overrides."""
    names = (*field_names(), *NAMES, *(name for name in field_rules() if "[" not in name))
    overrides = [f"{random_.choice(names)}={random_.choice(SCALARS)}" for _ in range(random_.randint(1, 4))]
    if random_.random() < 0.1:
        overrides.append(random_.choice((*NAMES, *SCALARS)))
    return Case("overrides", random_.choice(documents).encode(), tuple(overrides), None)


def _replaced_values(random_: random.Random, documents: list[str]) -> Case:
    """A sound file in which some values are hostile."""
    lines = random_.choice(documents).splitlines()
    for number in random_.sample(range(len(lines)), k=min(len(lines), random_.randint(1, 4))):
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {random_.choice(SCALARS)}"
    return Case("values", "\n".join(lines).encode("utf-8", "surrogatepass"), (), None)


def _damaged_bytes(random_: random.Random, documents: list[str]) -> Case:
    """A sound file with bytes changed, lost or doubled."""
    text = bytearray(random_.choice(documents).encode())
    for _ in range(random_.randint(1, 30)):
        place = random_.randrange(len(text))
        action = random_.randrange(4)
        if action == 0:
            text[place] = random_.randrange(256)
        elif action == 1:
            del text[place : place + random_.randint(1, 40)]
        elif action == 2:
            text[place:place] = text[place : place + random_.randint(1, 200)]
        else:
            text[place:place] = random_.choice(
                ("[", "{", "&a ", "*a ", "!!", ": ", "- ", "\n", "'", '"', "${")
            ).encode()
        text = text or bytearray(b"x")
    return Case("bytes", bytes(text), (), None)


def _structures(random_: random.Random, documents: list[str]) -> Case:
    """Documents made of nothing but structure: nests, aliases that unfold, long lists, odd keys."""
    depth, width = random_.choice((1, 5, 15, 17, 100, 5000)), random_.choice((1, 3, 50, 2000))
    doubling = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 4) if i else '1'}]" for i in range(min(depth, 30)))
    texts = (
        "[" * depth + "]" * depth,
        "{a: " * depth + "1" + "}" * depth,
        "".join(f"{'  ' * i}a:\n" for i in range(min(depth, 200))),
        doubling,
        f"data: &x {{path: a}}\noptim: {{<<: [{', '.join(['*x'] * width)}]}}",
        "run_dir: x\ndata: {mixture: [" + ", ".join(["{path: a, weight: 1}"] * width) + "]}",
        "run_dir: x\n"
        + "\n".join(f"{random_.choice(SCALARS)}: {random_.choice(SCALARS)}" for _ in range(min(width, 9))),
        "diffusion: {clip_search: {widths: [" + ", ".join([random_.choice(SCALARS)] * width) + "]}}",
        random_.choice(SCALARS),
        "\n---\n".join(random_.choice(SCALARS) for _ in range(3)),
        "x" * random_.choice((10, 300_000)),
        "? [a, b]\n: 1",
    )
    return Case("structures", random_.choice(texts).encode("utf-8", "surrogatepass"), (), None)


def _sizes(random_: random.Random, documents: list[str]) -> Case:
    """Numbers that are legal each for itself, in any combination, and any number of processes."""
    whole = [name for name, rule in field_rules().items() if rule.kind is int and "[" not in name]
    overrides = []
    for name in random_.sample(whole, k=random_.randint(1, 12)):
        overrides.append(f"{name}={random_.choice(SIZES if random_.random() < 0.8 else HUGE)}")
    world_size = random_.choice((None, None, 0, 1, 2, 6, 8, 64, 1000, 1024, 9973, 10**6))
    return Case("sizes", random_.choice(documents).encode(), tuple(overrides), world_size)


def attempt(case: Case, folder: Path) -> tuple[str, str]:
    """("accepted" | "refused" | "failed", why it failed)."""
    path = folder / "fuzz.yaml"
    path.write_bytes(case.text)
    started = time.process_time()
    try:
        config = load_config(path, case.overrides)
        dry_run(config, case.world_size)
        seconds = time.process_time() - started
        (folder / "copy.yaml").write_text(to_yaml(config), encoding="utf-8")
        outcome, why = "accepted", ""
        if load_config(folder / "copy.yaml") != config:
            outcome, why = "failed", "written as YAML and read back it is another configuration"
    except ConfigError as error:
        seconds = time.process_time() - started
        bad = [line for line in error.problems if "\n" in line or not any(remedy in line for remedy in REMEDIES)]
        lines = str(error).splitlines()
        if not error.problems or len(lines) != 1 + len(error.problems):
            bad.append(f"{len(lines)} lines for {len(error.problems)} problems")
        outcome, why = ("failed", f"an unclear message: {bad[0]!r}") if bad else ("refused", "")
    except Exception:
        return "failed", traceback.format_exc()
    if outcome != "failed" and seconds > SECONDS:
        return "failed", f"{outcome} after {seconds:.1f} s"
    return outcome, why


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in itertools.islice(cases(args.seed), args.cases):
            outcome, why = attempt(case, Path(folder))
            outcomes[case.kind, outcome] += 1
            if outcome == "failed":
                print(f"{case.kind}: {case.text[:300]!r}\n  {case.overrides} on {case.world_size}\n  {why}\n")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:9} {count:7,}")
    return int(any(outcome == "failed" for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
