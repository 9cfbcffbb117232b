"""The vocabulary of the exported BD3-LM models: embedding and head, and how they grow; depends on torch only."""

import torch
from torch import nn


class Vocabulary:
    """Embedding and head; mixed into the model."""

    def get_input_embeddings(self):
        """The token embedding (its parameter is called `embedding`)."""
        return self.backbone.vocab_embed

    def get_output_embeddings(self):
        """The head; never tied."""
        return self.backbone.output_layer.linear

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Change the number of ids, at the end; the mask keeps its id.

        Args:
            new_num_tokens: ids afterwards; None keeps them (and may still pad).
            pad_to_multiple_of: round up.
            mean_resizing: new rows are the mean of those of all ids but the mask; otherwise they are drawn as in a
                fresh model (embedding) or zero (head).

        Returns:
            The embedding module.

        Raises:
            ValueError: the mask or a special id would be lost.
        """
        old = self.config.vocab_size
        new = old if new_num_tokens is None else int(new_num_tokens)
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        special = [self.config.mask_token_id]
        special += [getattr(self.config, f"{role}_token_id", None) or 0 for role in ("bos", "eos", "pad")]
        if new <= max(special):
            raise ValueError(
                f"new_num_tokens ({new}): the model needs its special ids (mask {special[0]}); "
                f"use at least {max(special) + 1}"
            )
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        embedding.embedding = self._resized(
            embedding.embedding, new, mean_resizing, embedding.embedding.shape[1] ** -0.5
        )
        for name in ("weight", "bias") if self.config.head_bias else ("weight",):
            setattr(head, name, self._resized(getattr(head, name), new, mean_resizing, 0.0))
        head.out_features = self.config.vocab_size = new
        return embedding

    def _resized(self, parameter, new, from_mean, bound):
        """Its first rows, and new ones at the end."""
        rows = torch.arange(len(parameter), device=parameter.device) != self.config.mask_token_id
        added = parameter.new_empty(max(new - len(parameter), 0), *parameter.shape[1:])
        added = added.copy_(parameter[rows].float().mean(0)) if from_mean else added.uniform_(-bound, bound)
        return nn.Parameter(torch.cat([parameter[:new], added]), requires_grad=parameter.requires_grad)
