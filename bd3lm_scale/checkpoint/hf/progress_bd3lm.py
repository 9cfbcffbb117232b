"""The rows of one `generate` call: what is given, what is open, where each one ends, what is returned.

Shapes: B rows, L tokens of the longest row, N columns of the prompt as given, S tokens in a region, V ids including the
mask.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class GenerateOutput(ModelOutput):
    """What generate(..., fill=True) and generate(..., return_dict_in_generate=True) return.

    Attributes:
        sequences: int64 (B, N + new): the columns given, then new tokens.
        log_probs: (B, N + new): log-probability of each token written here, by the model itself (temperature 1, no
            filter) given what it saw when the token was written; 0 for tokens that were given and for padding. Where
            a block (mdlm: the whole text) has one open slot that is the exact conditional of its token; where there are
            more, each one's is given the tokens that the sampler had written before it.
    """

    sequences: torch.LongTensor = None
    log_probs: torch.FloatTensor = None


@dataclass
class Region:
    """Tokens [start, stop) decoded together, seen from window_start on."""

    start: int
    stop: int
    window_start: int


class GenerationState:
    """The rows of one `generate` call: what was given, what is open, where each one ends.

    Args:
        given_BN: ids as given, repeated for num_return_sequences.
        rows: their Alignment.
        settings: of the call.
        config: of the model.
        criteria: StoppingCriteriaList, maybe empty.
        streamer: of transformers, or None.

    Attributes:
        tokens_BL: the text, each row from column 0 on; masks where nothing is written yet.
        prompt_B: tokens given.
        open_BL: bool, columns to write.
        end_B: a row's tokens when it is finished.
        seen_BL: bool, columns of a row's own text, where the network would also see those behind a shorter row's end;
            None where it does not.
        log_prob_BL: of the tokens written.
    """

    def __init__(self, given_BN, rows, settings, config, criteria, streamer):
        self.given_BN, self.rows, self.settings = given_BN, rows, settings
        self.criteria, self.streamer = criteria, streamer
        self.num_closed = self.num_told = 0
        aligned_BN = rows.start(given_BN)
        is_real_BN = torch.ones_like(aligned_BN, dtype=torch.bool) if rows.is_real_BL is None else rows.is_real_BL
        self.prompt_B = is_real_BN.sum(1)
        num_new = 0 if settings.fill else self._num_new(config.model_length)
        self.end_B = self.prompt_B + num_new
        length = max(int(self.end_B.max()), given_BN.shape[1] if settings.fill else 0)
        if config.objective == "bd3lm":  # whole blocks: what lies beyond the end stays masked
            length = -(-length // config.block_size) * config.block_size
        self.tokens_BL = given_BN.new_full((len(given_BN), length), config.mask_token_id)
        shared = min(length, given_BN.shape[1])
        kept_BN = torch.where(is_real_BN, aligned_BN, config.mask_token_id)
        self.tokens_BL[:, :shared] = kept_BN[:, :shared]
        column_L = torch.arange(length, device=given_BN.device)
        is_inside_BL = column_L < self.end_B[:, None]
        self.open_BL = is_inside_BL & (self.tokens_BL == config.mask_token_id)
        reads_both_ways = config.attention_block is None and bool((self.end_B != self.end_B[0]).any())
        self.seen_BL = is_inside_BL if reads_both_ways else None
        self.log_prob_BL = torch.zeros(self.tokens_BL.shape, device=given_BN.device)
        if streamer is not None:
            streamer.put(given_BN.cpu())

    def _num_new(self, default):
        settings, columns = self.settings, self.given_BN.shape[1]
        if settings.max_length is None:
            return settings.max_new_tokens or default
        if settings.max_length <= columns:
            raise ValueError(
                f"generate: max_length ({settings.max_length}): the prompt has {columns} columns already; "
                "use max_new_tokens"
            )
        return settings.max_length - columns

    def free(self, region):
        """Bool (B, S): columns of the region to write now."""
        column_S = torch.arange(region.start, region.stop, device=self.open_BL.device)
        return self.open_BL[:, region.start : region.stop] & (column_S < self.end_B[:, None])

    def note(self, region, chosen_BS, logits, tokens):
        """Write tokens where chosen (in order of rows and columns), which had these logits (count, V)."""
        self.tokens_BL[:, region.start : region.stop][chosen_BS] = tokens
        log_p = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        self.log_prob_BL[:, region.start : region.stop][chosen_BS] = log_p

    def close(self, stop):
        """Everything before column `stop` is written; whether all rows are finished."""
        tokens_BS, eos = self.tokens_BL[:, self.num_closed : stop], self.settings.eos_ids
        column_S = torch.arange(self.num_closed, self.num_closed + tokens_BS.shape[1], device=tokens_BS.device)
        if eos:
            is_new_BS = (column_S >= self.prompt_B[:, None]) & (column_S < self.end_B[:, None])
            is_end_BS = is_new_BS & torch.isin(tokens_BS, torch.tensor(eos, device=tokens_BS.device))
            first_B = torch.where(is_end_BS, column_S, int(self.end_B.max())).amin(1)
            self.end_B = torch.minimum(self.end_B, first_B + 1)
        self.num_closed = stop
        self._tell(stop)
        return bool((self.end_B <= stop).all())

    def _tell(self, stop):
        """Show the streamer and the stopping criteria, token by token, what every unfinished row has by now."""
        if self.streamer is None and not self.criteria:
            return
        while True:
            is_going_B = self.end_B > self.prompt_B + self.num_told
            if not bool(is_going_B.any()) or int((self.prompt_B + self.num_told)[is_going_B].max()) >= stop:
                return
            self.num_told += 1
            sequences = torch.cat([self.given_BN, self._new(self.tokens_BL, self.num_told)], dim=1)
            if self.streamer is not None:
                self.streamer.put(sequences[:, -1].cpu())
            if self.criteria:
                is_stopped_B = torch.as_tensor(self.criteria(sequences, None), device=sequences.device)
                here_B = self.prompt_B + self.num_told
                self.end_B = torch.where(is_stopped_B & (here_B < self.end_B), here_B, self.end_B)

    def _new(self, values_BL, count, padding=None):
        """The first `count` new values of each row (B, count), filled up."""
        column_BC = self.prompt_B[:, None] + torch.arange(count, device=values_BL.device)
        inside = column_BC < self.end_B[:, None]
        new = values_BL.gather(1, column_BC.clamp(max=values_BL.shape[1] - 1))
        return torch.where(inside, new, self.settings.padding_id if padding is None else padding)

    def output(self):
        """The columns given, then the new tokens; in fill mode the columns given with their masks filled."""
        if self.streamer is not None:
            self.streamer.end()
        columns = self.given_BN.shape[1]
        if self.settings.fill:
            values = (self.open_BL, self.tokens_BL, self.log_prob_BL)
            is_open_BN, tokens_BN, log_probs_BN = (self.rows.back(x_BL[:, :columns]) for x_BL in values)
            return GenerateOutput(sequences=torch.where(is_open_BN, tokens_BN, self.given_BN), log_probs=log_probs_BN)
        count = int((self.end_B - self.prompt_B).max())
        sequences = torch.cat([self.given_BN, self._new(self.tokens_BL, count)], dim=1)
        if not self.settings.return_dict_in_generate:
            return sequences
        zeros = torch.zeros(self.given_BN.shape, device=sequences.device)
        return GenerateOutput(
            sequences=sequences, log_probs=torch.cat([zeros, self._new(self.log_prob_BL, count, 0.0)], dim=1)
        )
