"""Sample: text from a trained model.

    python -m bd3lm_scale.sample RUN_OR_CHECKPOINT_OR_HF [--prompt TEXT] [--length N] [--num-samples N] [a.b=c ...]
    python -m bd3lm_scale.sample RUN_OR_CHECKPOINT_OR_HF --infill "text <mask:16> text" [--num-samples N] [a.b=c ...]
    python -m bd3lm_scale.sample RUN_OR_CHECKPOINT_OR_HF --chat [--system TEXT] [--length N] [a.b=c ...]

Samples are printed and written as JSON lines. Settings are the `sampling` section of the configuration. Under torchrun,
parallel.tensor_parallel_size ranks hold one model together and the rest of the world shares out the samples.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from tqdm import tqdm

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3lm_scale.diffusion.registry import SAMPLERS
from bd3lm_scale.errors import CheckpointError, ConfigError
from bd3lm_scale.inference.batches import Sample, check_sampling, choose_sampler, draw_samples
from bd3lm_scale.inference.chat import Assistant
from bd3lm_scale.inference.infill import check_infill, parse_infill
from bd3lm_scale.inference.loading import Loaded, load_model
from bd3lm_scale.inference.loading_hf import is_hf_folder, native_checkpoint
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder, FullDenoiser
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.mesh import shutdown
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _arguments(argv)
    set_up_logging(None)
    try:
        loaded, tokenizer = load(args)
        output = args.output or default_output(args.source, loaded, args.chat)
        if args.chat:
            metrics = talk(args, loaded, tokenizer, output)
        else:
            prompts = read_prompts(args, tokenizer, loaded.config)
            metrics = write_samples(loaded, tokenizer, prompts, output, args.quiet, infill=bool(args.infill))
    except (ConfigError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    if loaded.engine.mesh.is_main_rank:
        print(summary(metrics, output), file=sys.stderr)
    shutdown()
    return ExitCode.FINISHED


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bd3lm_scale.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. sampling.nucleus_p=0.95")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeat for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='one prompt per line; .jsonl: its field "text"')
    parser.add_argument(
        "--infill", action="append", default=[], metavar="TEXT", help="write N tokens in place of each <mask:N>"
    )
    parser.add_argument(
        "--chat", action="store_true", help="answer messages: from the terminal, or line by line from standard input"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="with --chat: in place of the tokenizer's")
    parser.add_argument(
        "--length", type=int, help="tokens of a sample, prompt included; with --chat, of an answer (sampling.length)"
    )
    parser.add_argument("--num-samples", type=int, help="samples of each prompt (sampling.num_samples)")
    parser.add_argument("--batch-size", type=int, help="samples drawn together (sampling.batch_size)")
    parser.add_argument("--seed", type=int, help="sampling.seed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines (default: in the run's samples folder)")
    parser.add_argument("--tokenizer", type=Path, help="where the model comes without one")
    parser.add_argument("--sampler", metavar="NAME", help="sampling.sampler: " + ", ".join(SAMPLERS))
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights (sampling.weights)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="this step's checkpoint, not the newest")
    parser.add_argument("--quiet", action="store_true", help="print no text")
    return parser.parse_intermixed_args(argv)


def load(args: argparse.Namespace) -> tuple[Loaded, Tokenizer]:
    """The model and its tokenizer, with the command's settings in the configuration.

    On a CPU, where bf16 arithmetic is emulated, precision is fp32 unless the command says otherwise.
    """
    options = {"length": args.length, "num_samples": args.num_samples, "batch_size": args.batch_size, "seed": args.seed}
    options["sampler"] = args.sampler
    overrides = [f"sampling.{name}={value}" for name, value in options.items() if value is not None]
    overrides += [f"sampling.weights={args.weights}"] if args.weights else []
    overrides += args.overrides
    on_cpu = not torch.cuda.is_available() or "runtime.device=cpu" in overrides
    if on_cpu and not any(text.startswith("precision=") for text in overrides):
        overrides.append("precision=fp32")
    weights = next((t.split("=")[1] for t in reversed(overrides) if t.startswith("sampling.weights=")), "ema")
    with native_checkpoint(args.source, overrides) as (path, rest):
        loaded = load_model(path, rest, weights, args.checkpoint)
    check_sampling(loaded.config, infill=bool(args.infill) or args.chat)
    folder = args.tokenizer or (args.source if is_hf_folder(args.source) else loaded.tokenizer_path)
    if folder is None:
        raise ValueError(f"{args.source}: no tokenizer found with the model; give one with --tokenizer FOLDER")
    tokenizer, meta = load_tokenizer(folder, args.chat_template), loaded.reader.meta
    if (tokenizer.vocab_size, tokenizer.mask_token_id) != (meta["vocab_size"], meta["mask_token_id"]):
        raise ValueError(
            f"--tokenizer ({folder}): has {tokenizer.vocab_size} ids and mask {tokenizer.mask_token_id}, the model has "
            f"{meta['vocab_size']} and {meta['mask_token_id']}; give the model's own tokenizer"
        )
    return loaded, tokenizer


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, config: RunConfig) -> list[tuple[int, ...]]:
    """The tokens each sample starts with: what precedes a document in training, then the prompt."""
    start = start_token(tokenizer, config)
    if args.infill:
        if args.prompt or args.prompts or args.length is not None:
            raise ValueError("--infill: says the whole text and its length; leave out --prompt, --prompts and --length")
        filled = [parse_infill(text, tokenizer, start) for text in args.infill]
        check_infill(filled, config.diffusion.objective, config.data.context_length)
        return [text for text in filled for _ in range(config.sampling.num_samples)]
    texts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise ValueError(f"--prompts ({args.prompts}): no such file")
        lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts += [json.loads(line)["text"] for line in lines] if args.prompts.suffix == ".jsonl" else lines
    encoded = [(start, *ids) for ids in tokenizer.encode_batch(texts or [""])]
    return [prompt for prompt in encoded for _ in range(config.sampling.num_samples)]


def start_token(tokenizer: Tokenizer, config: RunConfig) -> int:
    """What precedes a document in training: EOS, which separates documents, or BOS where rows are wrapped."""
    return tokenizer.bos_token_id if config.data.wrap_rows else tokenizer.eos_token_id


def talk(args: argparse.Namespace, loaded: Loaded, tokenizer: Tokenizer, output: Path | None) -> dict[str, float]:
    """Answer messages until there are no more; the records join those in the output file."""
    if args.prompt or args.prompts or args.infill or args.num_samples not in (None, 1):
        raise ValueError("--chat: answers messages; leave out --prompt, --prompts, --infill and --num-samples")
    if loaded.engine.mesh.world_size > 1:
        raise ValueError("--chat: runs in one process; start it without torchrun")
    start, opener = start_token(tokenizer, loaded.config), network_opener(loaded)
    assistant = Assistant(loaded.config, tokenizer, opener, start, loaded.engine.mesh.device, args.system)
    started, records = time.perf_counter(), []
    with _open_output(output, "a") as file, suppress(KeyboardInterrupt):
        for sample, messages in assistant.talk(sys.stdin, sys.stdout):
            records.append(record_of(sample, tokenizer, loaded) | {"messages": messages})
            if file is not None:
                file.write(json.dumps(records[-1], ensure_ascii=False) + "\n")
                file.flush()
    return _totals(records, time.perf_counter() - started)


def default_output(source: str, loaded: Loaded, chat: bool = False) -> Path | None:
    """RUN/samples/step_..._SAMPLER_LENGTH.jsonl for a checkpoint inside a run folder, None otherwise."""
    run = loaded.reader.path.parent.parent
    if is_hf_folder(source) or not (run / "config.yaml").is_file():
        return None
    sampling = loaded.config.sampling
    kind = f"{choose_sampler(loaded.config)}_{sampling.length}{'_eos' if sampling.stop_at_eos else ''}"
    kind = "chat" if chat else kind
    return run / "samples" / f"step_{loaded.reader.meta['step']:08d}_{kind}.jsonl"


def network_opener(loaded: Loaded) -> Callable[[int], Any]:
    """Makes the network with an empty context for a number of rows."""
    config, sampling = loaded.config, loaded.config.sampling
    if loaded.engine.mesh.pipeline_size > 1:
        raise ConfigError(
            ["parallel.pipeline_parallel_size: sampling runs on whole models; use 1 (and tensor_parallel_size)"]
        )
    model = loaded.engine.chunks[0].eval()
    if config.diffusion.objective in ("mdlm", "sedd"):
        return lambda batch_size: FullDenoiser(model)
    wants_bf16 = sampling.cache_dtype == "bf16" or (sampling.cache_dtype == "auto" and config.precision == "bf16")
    cache_dtype = torch.bfloat16 if wants_bf16 else torch.float32
    window = sampling.window or config.data.context_length
    is_plain = not (sampling.recompute_window or config.diffusion.shift_targets)
    if loaded.engine.mesh.tensor_size == 1 and sampling.kv_cache and is_plain:
        weights = FastWeights(model)
        return lambda batch_size: FastDecoder(weights, config.block_size, batch_size, window, cache_dtype)
    return lambda batch_size: CachedDecoder(
        model,
        config.block_size,
        batch_size,
        window=window,
        cache_dtype=cache_dtype,
        recompute_window=sampling.recompute_window,
        use_cache=sampling.kv_cache,
    )


def write_samples(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: list[tuple[int, ...]],
    output: Path | None,
    quiet: bool = False,
    infill: bool = False,
) -> dict[str, float]:
    """Draw all samples; the reporting rank prints and writes them as they come. Returns totals over them."""
    mesh, config = loaded.engine.mesh, loaded.config
    size = config.sampling.batch_size
    mine = [i for i in range(len(prompts)) if (i // size) % mesh.data_size == mesh.data_rank]
    mask, length = tokenizer.mask_token_id, config.sampling.length
    total = sum(prompts[i].count(mask) if infill else length - len(prompts[i]) for i in mine)
    started, records = time.perf_counter(), []
    with (
        tqdm(total=total, unit="token", disable=not (mesh.is_main_rank and sys.stderr.isatty())) as bar,
        _open_output(output if mesh.is_main_rank else None) as file,
    ):
        samples = draw_samples(
            network_opener(loaded),
            config,
            [prompts[i] for i in mine],
            mine,
            mask_token_id=mask,
            eos_token_id=tokenizer.eos_token_id,
            device=mesh.device,
            on_progress=bar.update,
            infill=infill,
        )
        for sample in samples if mesh.data_size == 1 else _gather(samples, loaded):
            records.append(record_of(sample, tokenizer, loaded))
            if file is not None:
                file.write(json.dumps(records[-1], ensure_ascii=False) + "\n")
                file.flush()
            if mesh.is_main_rank and not quiet:
                tqdm.write(_shown(records[-1], tokenizer), file=sys.stdout)
    return _totals(records, time.perf_counter() - started)


def _gather(samples: Iterator[Sample], loaded: Loaded) -> list[Sample]:
    """Everybody's samples in order of their numbers; tensor-parallel peers hold equal ones, which count once."""
    mesh = loaded.engine.mesh
    ranks = Agreement(mesh.rank, mesh.world_size, loaded.engine.host_group)
    parts = ranks.exchange([asdict(sample) for sample in samples])
    everyone = [Sample(**{**found, "tokens": tuple(found["tokens"])}) for part in parts for found in part]
    return sorted({sample.index: sample for sample in everyone}.values(), key=lambda sample: sample.index)


@contextmanager
def _open_output(path: Path | None, mode: str = "w") -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        yield cast(TextIO, file)


def record_of(sample: Sample, tokenizer: Tokenizer, loaded: Loaded) -> dict[str, Any]:
    """One line of the output. `text` shows special tokens, end of text as `end_of_text`; infilled text has `slots`."""
    config, meta = loaded.config, loaded.reader.meta
    sampling = config.sampling
    slots = [
        {"position": place, "token": sample.tokens[place], "log_prob": log_prob,
         "text": tokenizer.decode([sample.tokens[place]], keep_special=True)}
        for place, log_prob in sample.slots
    ]  # fmt: skip
    return {
        "sample": sample.index,
        "text": tokenizer.decode(sample.tokens, keep_special=True),
        "end_of_text": tokenizer.decode([tokenizer.eos_token_id], keep_special=True),
        "num_tokens": len(sample.tokens),
        "prompt_tokens": sample.prompt_length,
        "finish": sample.finish,
        "nfe": sample.nfe,
        "forward_calls": sample.forward_calls,
        "redraws": sample.redraws,
        "seconds": round(sample.seconds, 4),
        "sampler": choose_sampler(config),
        "length": len(sample.tokens) if slots else sampling.length,
        "nucleus_p": sampling.nucleus_p,
        "temperature": sampling.temperature,
        "stop_at_eos": sampling.stop_at_eos,
        "seed": sampling.seed,
        "objective": config.diffusion.objective,
        "block_size": config.block_size,
        "step": meta["step"],
        "weights": loaded.weights,
        "tokens": list(sample.tokens),
    } | ({"slots": slots} if slots else {})


def _shown(record: dict[str, Any], tokenizer: Tokenizer) -> str:
    about = f"{record['num_tokens']} tokens, NFE {record['nfe']}, ended by {record['finish']}"
    return f"--- sample {record['sample']} ({about})\n{tokenizer.decode(record['tokens'])}"


def _totals(records: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    count = max(1, len(records))
    new = sum(record["num_tokens"] - record["prompt_tokens"] for record in records)
    return {
        "samples": len(records),
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": new / seconds,
        "nfe": sum(record["nfe"] for record in records) / count,
        "forward_calls": sum(record["forward_calls"] for record in records) / count,
    }


def summary(metrics: dict[str, float], output: Path | None) -> str:
    """The totals as one line, and where the samples are."""
    line = (
        f"{metrics['samples']:.0f} samples, {metrics['new_tokens']:,.0f} new tokens in {metrics['seconds']:.1f} s: "
        f"{metrics['tokens_per_second']:.1f} tokens/s, NFE {metrics['nfe']:.1f} and "
        f"{metrics['forward_calls']:.1f} forward calls per sample"
    )
    return line if output is None else f"{line}\nwritten to {output}"
