"""The tokens of a data module: those of the text, the one that ends documents, keys and values of recall."""

from collections.abc import Sequence

from datamodules.tokenizers import Tokenizer
from theria.tasks.recall import RecallSpec

_MULTIPLE = 128


class Vocabulary:
    """Numbers and names of all tokens.

    Args:
        tokenizer: of the text.
        recall: shape of the recall sequences, None where there are none.

    Attributes:
        end_token: the token that leads, and so ends, a document.
        size: tokens that a model must know.
    """

    def __init__(self, tokenizer: Tokenizer, recall: RecallSpec | None) -> None:
        self.tokenizer = tokenizer
        self.recall = recall
        self.end_token = tokenizer.num_tokens
        self.size = self.end_token + 1 if recall is None else recall.vocab

    def check(self, model_vocab: int, tokenizer_name: str) -> None:
        """Refuse a model that lacks tokens, or has more of them than rounding up explains.

        Raises:
            ValueError: model_vocab is not from the size to its next multiple of 128.
        """
        most = -(-self.size // _MULTIPLE) * _MULTIPLE
        if not self.size <= model_vocab <= most:
            raise ValueError(
                f"the model's vocab_size is {model_vocab}, but tokenizer {tokenizer_name!r} makes "
                f"{self.size} tokens ({self.end_token} of text, one between documents, "
                f"{self.size - self.end_token - 1} of recall): set vocab_size to {self.size}, "
                f"or at most {most}"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, those beyond the text as <end>, <key 3> and <value 5>."""
        parts, text = [], []
        for token in tokens:
            if token < self.end_token:
                text.append(token)
                continue
            parts += [self.tokenizer.decode(text), self._name_of(token)]
            text = []
        return "".join([*parts, self.tokenizer.decode(text)])

    def _name_of(self, token: int) -> str:
        spec = self.recall
        if token == self.end_token or spec is None:
            return "<end>" if token == self.end_token else f"<{token}>"
        if spec.first_key <= token < spec.first_value:
            return f"<key {token - spec.first_key}>"
        in_values = spec.first_value <= token < spec.vocab
        return f"<value {token - spec.first_value}>" if in_values else f"<{token}>"
