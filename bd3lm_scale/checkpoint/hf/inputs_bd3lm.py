"""What the exported BD3-LM models are given: ids are checked, rows are moved to start in column 0; torch only.

Blocks are counted from a row's first token, so padding on the left would move them. Rows are therefore shifted before
the network sees them, and what it gives is shifted back.

Shapes: B rows, L columns.
"""

import torch


def checked_ids(ids, vocab_size, name="input_ids", mask_token_id=None, counts_BL=None):
    """Ids (B, L) as int64.

    Args:
        ids: a tensor of any integer type.
        vocab_size: ids are below it.
        name: what messages call the tensor.
        mask_token_id: an id that may not occur; None allows all.
        counts_BL: bool, which ids are looked at; None: all.

    Raises:
        ValueError: another shape or type, ids outside the vocabulary, or the mask.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"{name} ({shape}): give a tensor of shape (rows, tokens), as tokenizers return with 'pt'")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} ({ids.dtype}): token ids are integers; use torch.int64")
    if not len(ids):
        raise ValueError(f"{name} {tuple(ids.shape)}: there is no row")
    ids = ids.long()
    counts_BL = torch.ones_like(ids, dtype=torch.bool) if counts_BL is None else counts_BL
    is_outside_BL = counts_BL & ((ids < 0) | (ids >= vocab_size))
    if bool(is_outside_BL.any()):
        raise ValueError(f"{_first(ids, is_outside_BL, name)} is outside the vocabulary of {vocab_size} ids (0 and up)")
    is_mask_BL = counts_BL & (ids == (-1 if mask_token_id is None else mask_token_id))
    if bool(is_mask_BL.any()):
        raise ValueError(
            f"{_first(ids, is_mask_BL, name)} is the mask, which is no text; "
            "generate(..., fill=True) puts text in its place"
        )
    return ids


def _first(ids, is_wrong_BL, name):
    row, column = is_wrong_BL.nonzero()[0].tolist()
    return f"{name}: id {int(ids[row, column])} at row {row}, column {column}"


def is_whole(value):
    """Whether a number is an integer, of whatever type; False for what is none."""
    try:
        return not isinstance(value, bool | str) and int(value) == value
    except (TypeError, ValueError, OverflowError):
        return False


class Alignment:
    """Rows moved so that each one's first real token is in column 0.

    Args:
        attention_mask: (B, L), 0 for padding on the left, on the right or both; None: no padding.
        batch: B.
        length: L.

    Attributes:
        is_real_BL: bool, in moved columns; None where all tokens are real.

    Raises:
        ValueError: another shape, values other than 0 and 1, or padding between real tokens.
    """

    def __init__(self, attention_mask, batch, length):
        self.is_real_BL = self._first_B1 = None
        self._length = length
        if attention_mask is None:
            return
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}: give one value per token, shape {(batch, length)}"
            )
        is_real_BL = attention_mask.bool()
        if not torch.compiler.is_compiling() and not bool((attention_mask == is_real_BL).all()):
            raise ValueError("attention_mask: holds other values than 1 (a token) and 0 (padding)")
        column_L = torch.arange(length, device=is_real_BL.device)
        if torch.compiler.is_compiling():  # a graph cannot depend on values: rows are moved by 0 too
            self._first_B1 = self._first(is_real_BL, column_L)
            self.is_real_BL = self.start(is_real_BL)
        elif not bool(is_real_BL.all()):
            first_B1 = self._first(is_real_BL, column_L)
            self._first_B1 = first_B1 if bool((first_B1 > 0).any()) else None
            self.is_real_BL = self.start(is_real_BL)
            has_hole_B = (self.is_real_BL[:, 1:] & ~self.is_real_BL[:, :-1]).any(1)
            if bool(has_hole_B.any()):
                raise ValueError(
                    f"attention_mask: rows {has_hole_B.nonzero().flatten().tolist()} have padding between their "
                    "tokens; pad at the left or the right end only"
                )

    def _first(self, is_real_BL, column_L):
        return torch.where(is_real_BL, column_L, self._length).amin(1, keepdim=True) % self._length

    def start(self, x):
        """Move rows of x (B, k L, ...), each of k parts by itself, to their first token; None stays None."""
        return self._moved(x, 1)

    def back(self, x):
        """Undo `start`."""
        return self._moved(x, -1)

    def _moved(self, x, sign):
        if x is None or self._first_B1 is None:
            return x
        column_L = torch.arange(self._length, device=x.device)
        index_BL = (column_L + sign * self._first_B1.to(x.device)) % self._length
        index = index_BL.reshape(len(index_BL), 1, self._length, *[1] * (x.dim() - 2))
        return torch.take_along_dim(x.unflatten(1, (-1, self._length)), index, dim=2).flatten(1, 2)
