"""Tasks of the lm-evaluation-harness: `bd3lm` as one of its models, and the command that runs it.

    python -m bd3lm_scale.evaluate_harness RUN_OR_CHECKPOINT_OR_HF --tasks TASK,... [--draws N] [lm_eval's own options]
    python -m bd3lm_scale.evaluate_harness --model bd3lm --model_args pretrained=FOLDER --tasks TASK,...

The second form is lm_eval's own command line: lm_eval loads no models from outside, and importing this module makes
`bd3lm` known to it (`lm_eval.simple_evaluate(model="bd3lm", ...)`).

A log-likelihood is that of the continuation in its blocks, after the clean context: exact for ar and blocks of one
token; elsewhere minus the bound (ELBO), without noise where at most four tokens of a block are scored and otherwise
from stratified draws, whose standard error is logged.
"""

import argparse
import logging
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3lm_scale.errors import CheckpointError, ConfigError
from bd3lm_scale.inference.loading import find_tokenizer
from bd3lm_scale.inference.loading_hf import is_hf_folder
from bd3lm_scale.runtime.exit_codes import ExitCode

BATCH_SIZE = 32
MAX_NEW_TOKENS = 256
"""Of a generation task that does not say."""

_log = logging.getLogger(__name__)

Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and continuation that fit one row together."""


def load_exported(
    source: str | Path, weights: str = "ema", step: int | None = None, tokenizer: str | Path | None = None
) -> tuple[BD3LM, Tokenizer]:
    """The exported class and the tokenizer of a Hugging Face folder, a run or a checkpoint (exported on the way).

    Raises:
        ValueError, CheckpointError: no such model, or no tokenizer with it.
    """
    if is_hf_folder(source):
        return cast(BD3LM, BD3LM.from_pretrained(source)).eval(), load_tokenizer(tokenizer or source)
    path = find_checkpoint(source, step)
    reader = open_checkpoint(path)
    folder = tokenizer or find_tokenizer(path, from_dict(reader.meta["config"]))
    if folder is None:
        raise ValueError(f"{source}: no tokenizer found with the model; give one with tokenizer=FOLDER")
    text = load_tokenizer(folder)
    with tempfile.TemporaryDirectory(prefix="bd3lm_scale_") as temporary:
        export_hf(reader, Path(temporary) / "hf", weights=weights, tokenizer=text)
        return cast(BD3LM, BD3LM.from_pretrained(Path(temporary) / "hf")).eval(), text


@register_model("bd3lm")
class BlockDiffusionLM(TemplateLM):
    """A bd3lm, mdlm, sedd or ar model in the harness.

    Args:
        pretrained: Hugging Face folder, run folder or checkpoint.
        batch_size: rows scored or written together; "auto" is BATCH_SIZE.
        device: cpu | cuda | ...; default: cuda where there is one.
        dtype: float32 | bfloat16.
        draws: noise draws per row, where the bound is not computed without noise; default: those of `score`.
        seed: of the noise and of generated text.
        weights, checkpoint: ema | raw, and the step, of a run folder.
        tokenizer: folder, where the model comes without one.
        sampler, num_steps, threshold: of generated text; default: the model's.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        draws: int | None = None,
        seed: int = 0,
        weights: str = "ema",
        checkpoint: int | None = None,
        tokenizer: str | None = None,
        sampler: str | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.float32}
        if dtype not in types:
            raise ValueError(f"dtype ({dtype}): unknown; use float32 or bfloat16")
        is_auto = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = BATCH_SIZE if is_auto else int(cast(int, batch_size))
        if self.batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}): must be at least 1")
        self.model, self.text = load_exported(pretrained, weights, checkpoint, tokenizer)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(device=self._device, dtype=types[dtype])  # pyright: ignore[reportCallIssue]
        self.draws, self.seed = draws, int(seed)
        writing = {"sampler": sampler, "num_steps": num_steps, "threshold": threshold}
        self.writing = {name: value for name, value in writing.items() if value is not None}
        self.stderr: list[float] = []
        """Standard error in nats of each log-likelihood of the last call; 0 where exact."""

    # ---- text and tokens -------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes documents in training: the context of text without one."""
        start = getattr(self.model.generation_config, "bos_token_id", None)
        return self.text.eos_token_id if start is None else int(start)

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return self.model.config.model_length

    @property
    def tokenizer_name(self) -> str:
        """Tells requests cached for one tokenizer from another's."""
        return f"bd3lm-{self.text.kind}-{self.text.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; nothing is added around text."""
        return self.text.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both sides; spaces at the border belong to the continuation.

        Where a token of the whole text spans the border, each side is tokenized by itself, so that no text is lost.
        """
        stripped = context.rstrip()
        context, continuation = stripped or context, (context[len(stripped) :] if stripped else "") + continuation
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        spans = whole[: len(before)] != before or len(whole) == len(before)
        return before, self.tok_encode(continuation) if spans else whole[len(before) :]

    # ---- likelihoods -----------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, longer ones in windows, each after the token that precedes documents."""
        texts = [request.args[0] for request in requests]
        pairs = [((self.prefix_token_id,), tuple(self.tok_encode(text))) for text in texts]
        found = [total for total, _ in self._score_all(pairs, disable_tqdm, greedy=False)]
        for text, total in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = self._score_all(pairs, disable_tqdm, greedy=True)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def pieces(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> list[Piece]:
        """Rows that score a continuation: as much context as fits; one longer than a row goes in windows."""
        limit = self.max_length
        if not continuation:
            return []
        if len(continuation) < limit:
            return [(context[-(limit - len(continuation)) :], continuation)]
        windows = get_rolling_token_windows(list(continuation), context[-1], max_seq_len=limit - 1, context_len=1)
        return [(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]

    def _score_all(self, pairs: Sequence[Piece], quiet: bool, greedy: bool) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each pair; equal rows are scored once."""
        rows = [self.pieces(*pair) for pair in pairs]
        distinct = list(dict.fromkeys(piece for pieces in rows for piece in pieces))
        distinct.sort(key=lambda piece: (self._is_noisy(piece), len(piece[0]) + len(piece[1])), reverse=True)
        scores: dict[Piece, tuple[float, float, bool]] = {}
        with tqdm(total=len(distinct), desc="log-likelihoods", unit="row", disable=quiet) as bar:
            for group in self._batches(distinct):
                scores |= zip(group, self._score(group, greedy), strict=True)
                bar.update(len(group))
        found = [[scores[piece] for piece in pieces] for pieces in rows]
        self.stderr = [sum(error**2 for _, error, _ in parts) ** 0.5 for parts in found]
        self._report()
        return [(-sum(nats for nats, _, _ in parts), all(same for _, _, same in parts)) for parts in found]

    def _batches(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        """Batches in which either all rows need noise or none does, so that a row's figure is the same in any batch."""
        for noisy in (True, False):
            mine = [piece for piece in pieces if self._is_noisy(piece) == noisy]
            for start in range(0, len(mine), self.batch_size):
                yield mine[start : start + self.batch_size]

    def _is_noisy(self, piece: Piece) -> bool:
        config, start = self.model.config, len(piece[0])
        size = config.block_size if config.objective == "bd3lm" else self.max_length
        first, last = start // size, (start + len(piece[1]) - 1) // size
        ends = [(max(start, b * size), min(start + len(piece[1]), (b + 1) * size)) for b in range(first, last + 1)]
        most = max(stop - begin for begin, stop in ends)
        return config.objective != "ar" and (config.time_conditioning or most > 4)

    def _score(self, group: list[Piece], greedy: bool) -> list[tuple[float, float, bool]]:
        tokens_BL, is_real_BL, labels_BL = self._rows(group)
        seeds = [self.seed + zlib.crc32(repr(piece).encode()) for piece in group]  # of the row, wherever it stands
        scores = self.model.score(
            tokens_BL, attention_mask=is_real_BL, labels=labels_BL, draws=self.draws, seed=cast(Any, seeds)
        )
        same_B = self._is_greedy(tokens_BL, is_real_BL, labels_BL != -100) if greedy else torch.ones(len(group))
        values = (scores.nats.tolist(), scores.nats_stderr.nan_to_num().tolist(), same_B.bool().tolist())
        return list(zip(*values, strict=True))

    def _rows(self, group: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, which of them are real, and labels: int64 (B, L), padded on the right."""
        length = max(len(context) + len(continuation) for context, continuation in group)
        tokens_BL = torch.zeros(len(group), length, dtype=torch.int64)
        is_real_BL, labels_BL = torch.zeros_like(tokens_BL), torch.full_like(tokens_BL, -100)
        for row, (context, continuation) in enumerate(group):
            here, end = len(context), len(context) + len(continuation)
            tokens_BL[row, :end] = torch.tensor([*context, *continuation])
            is_real_BL[row, :end] = 1
            labels_BL[row, here:end] = tokens_BL[row, here:end]
        return tokens_BL.to(self._device), is_real_BL.to(self._device), labels_BL.to(self._device)

    @torch.no_grad()
    def _is_greedy(self, tokens_BL: Tensor, is_real_BL: Tensor, counts_BL: Tensor) -> Tensor:
        """Bool (B,): each continuation token is the likeliest one after the tokens before it, later ones masked."""
        config = self.model.config
        excluded = torch.tensor([config.mask_token_id], device=tokens_BL.device)
        best = lambda logits: logits.index_fill(-1, excluded, float("-inf")).argmax(-1)  # noqa: E731
        if config.objective == "ar":
            guess_BL = torch.zeros_like(tokens_BL)
            guess_BL[:, 1:] = best(self.model.causal_losses(tokens_BL, tokens_BL, counts_BL, is_real_BL)[1])[:, :-1]
            return ((guess_BL == tokens_BL) | ~counts_BL).all(1)
        size = config.block_size if config.objective == "bd3lm" else tokens_BL.shape[1]
        column_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        before_BL = counts_BL.cumsum(1) - counts_BL.long()
        first_BL = before_BL[:, column_L // size * size]  # scored tokens before each one's block
        place_BL = torch.where(counts_BL, before_BL - first_BL, -1)
        same_B = torch.ones(len(tokens_BL), dtype=torch.bool, device=tokens_BL.device)
        for place in range(int(place_BL.max()) + 1):
            rows = (same_B & (place_BL >= place).any(1)).nonzero()[:, 0]
            if not len(rows):
                break
            noisy = tokens_BL[rows].masked_fill(place_BL[rows] >= place, config.mask_token_id)
            rate = torch.ones(noisy.shape, device=noisy.device)
            logits = self.model.token_losses(noisy, tokens_BL[rows], counts_BL[rows], rate, None, is_real_BL[rows])[1]
            same_B[rows] = ((best(logits) == tokens_BL[rows]) | (place_BL[rows] != place)).all(1)
        return same_B

    def _report(self) -> None:
        noisy = [error for error in self.stderr if error]
        if noisy:
            _log.info(
                "log-likelihoods: %d of %d from %s noise draws, standard error %.3f nats on average, %.3f at most",
                len(noisy), len(self.stderr), self.draws or "8", sum(noisy) / len(noisy), max(noisy),
            )  # fmt: skip
        else:
            _log.info("log-likelihoods: all %d without noise", len(self.stderr))

    # ---- text ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first stop string; requests with equal settings are written together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as bar:
            for indices in groups.values():
                indices.sort(key=lambda index: len(requests[index].args[0]))
                for start in range(0, len(indices), self.batch_size):
                    some = indices[start : start + self.batch_size]
                    texts = self._write([requests[index].args[0] for index in some], requests[some[0]].args[1])
                    for index, text in zip(some, texts, strict=True):
                        found[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(some))
        return found

    def _write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Continuations of one batch; `settings` as tasks give them."""
        settings = dict(settings)
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        lengths = [settings.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        new = next((length for length in lengths if length is not None), MAX_NEW_TOKENS)
        if not settings.setdefault("do_sample", bool(settings.get("temperature"))) or not settings.get(
            "temperature", 1
        ):
            settings |= {"do_sample": False, "temperature": 1.0}
        ids = [(tuple(self.tok_encode(text)) or (self.prefix_token_id,))[-self.max_length :] for text in contexts]
        tokens_BL, is_real_BL, _ = self._rows([(row, ()) for row in ids])
        columns = tokens_BL.shape[1]
        stops = [_Until(until, columns, self.text)] if until else []
        options = {
            "seed": self.seed,
            "stopping_criteria": stops,
            "max_new_tokens": int(new),
            **self.writing,
            **settings,
        }
        options.setdefault("pad_token_id", self.text.eos_token_id)
        written = self.model.generate(tokens_BL, attention_mask=is_real_BL, **options)
        return [
            _cut(self.text.decode(_without_end(row, self.text.eos_token_id)), until)
            for row in written[:, columns:].tolist()
        ]


class _Until(StoppingCriteria):
    """Ends rows whose new text holds a stop string; only what could complete one is decoded."""

    def __init__(self, until: list[str], columns: int, text: Tokenizer) -> None:
        self.until, self.columns, self.text = until, columns, text
        self.reach = 4 * max(map(len, until)) + 4  # a character has at most four byte tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tails = input_ids[:, max(self.columns, input_ids.shape[1] - self.reach) :].tolist()
        found = [any(stop in self.text.decode(tail) for stop in self.until) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _without_end(row: list[int], eos_token_id: int) -> list[int]:
    return row[: row.index(eos_token_id)] if eos_token_id in row else row


def _cut(text: str, until: list[str]) -> str:
    """Text before the first stop string."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    logging.getLogger("bd3lm_scale").setLevel(logging.INFO)
    try:
        if not {"--model", "-M"} & set(given):
            given = _lm_eval_arguments(given)
        sys.argv = ["lm_eval", *given]
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    except (ConfigError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    return ExitCode.FINISHED


def _lm_eval_arguments(given: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(
        prog="python -m bd3lm_scale.evaluate_harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything else goes to lm_eval: --num_fewshot, --limit, --include_path, --batch_size, ...",
    )
    parser.add_argument("source", help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names, by spaces or commas")
    parser.add_argument("--draws", type=int, help="noise draws per row, where log-likelihoods are not exact")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights of a run")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="this step's checkpoint, not the newest")
    parser.add_argument("--tokenizer", help="where the model comes without one")
    parser.add_argument("--sampler", help="of generated text")
    args, rest = parser.parse_known_args(given)
    names = ("draws", "weights", "checkpoint", "tokenizer", "sampler")
    values = {"pretrained": args.source} | {name: getattr(args, name) for name in names}
    texts = [f"{name}={value}" for name, value in values.items() if value is not None]
    if any("," in text for text in texts):
        raise ValueError(f"{args.source}: lm_eval's model arguments are divided by commas; use a path without one")
    return ["run", "--model", "bd3lm", "--model_args", ",".join(texts), "--tasks", *args.tasks, *rest]
