"""Language models from disk: checkpoints of ours, and directories of Hugging Face's."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer
from lightning_modules.checkpoint_io import UnreadableCheckpointError, read_checkpoint
from lightning_modules.run_directory import ResumeError, find_restart
from theria.models.memory_lm import MemoryLM

HUGGING_FACE = "hf:"
_WEIGHTS = "model."


class InputError(ValueError):
    """What was given on the command line cannot be used; the message says why."""


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode, and how it reads text.

    Attributes:
        name: what was loaded.
        model: gives an object with ``logits`` (batch, length, vocabulary) for tokens (batch, length).
        encode: tokens of a text, with what stands before it.
        positions: tokens that it can read at once; None for any number.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], Tensor]
    positions: int | None = None


def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens of one sample (length,), in float32 at least."""
    logits = model(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[1:])


def load(given: str, tokenizer: str | None) -> LanguageModel:
    """The model that ``given`` names.

    Args:
        given: a checkpoint of `lightning_modules.MemoryLM` or its run directory, or "hf:DIRECTORY".
        tokenizer: None for the model's own, "byte", or a JSON file of the tokenizers package.

    Raises:
        InputError: there is no such model, or no tokenizer for it.
    """
    if given.startswith(HUGGING_FACE):
        return _hugging_face(Path(given.removeprefix(HUGGING_FACE)), tokenizer)
    try:
        path = find_restart(given).checkpoint
        checkpoint = read_checkpoint(path)
    except (ResumeError, UnreadableCheckpointError) as error:
        raise InputError(f"--model {given}: {error}") from error
    return _ours(path, checkpoint, tokenizer)


def _ours(path: Path, checkpoint: dict[str, Any], tokenizer: str | None) -> LanguageModel:
    settings = checkpoint.get("hyper_parameters", {})
    sizes = set(inspect.signature(MemoryLM).parameters) - {"vocab"}
    if missing := sorted((sizes | {"vocab_size"}) - set(settings)):
        raise InputError(f"{path} is no checkpoint of MemoryLM: its hyper-parameters lack {missing}")
    model = MemoryLM(settings["vocab_size"], **{name: settings[name] for name in sizes})
    weights = {
        name.removeprefix(_WEIGHTS): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_WEIGHTS)
    }
    model.load_state_dict(weights)
    own = checkpoint.get("datamodule_hyper_parameters", {}).get("tokenizer", "byte")
    reader = _tokenizer(tokenizer or own)
    if reader.num_tokens >= settings["vocab_size"]:
        raise InputError(
            f"{path} knows {settings['vocab_size']} tokens, too few for the tokenizer's {reader.num_tokens} "
            "and the one that begins a document"
        )
    lead = torch.tensor([reader.num_tokens])

    def encode(text: str) -> Tensor:
        return torch.cat((lead, *reader.encode([text.encode()])))

    return LanguageModel(str(path), model.eval(), encode)


def _hugging_face(directory: Path, tokenizer: str | None) -> LanguageModel:
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no directory of a Hugging Face model: it has no config.json")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError("hf: needs the package transformers: pip install theria[hf]") from error
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    positions = getattr(model.config, "max_position_embeddings", None)
    if tokenizer is None:
        try:
            own = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{directory} has no tokenizer that can be read: name one with --tokenizer"
            ) from error

        def encode(text: str) -> Tensor:
            return torch.tensor(own(text)["input_ids"])

        return LanguageModel(str(directory), model, encode, positions)
    reader = _tokenizer(tokenizer)
    if reader.num_tokens > model.config.vocab_size:
        raise InputError(
            f"{directory} knows {model.config.vocab_size} tokens, the tokenizer {reader.num_tokens}"
        )
    return LanguageModel(str(directory), model, lambda text: reader.encode([text.encode()])[0], positions)


def _tokenizer(name: str) -> Tokenizer:
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe":
        raise InputError("the model's tokenizer was trained with its data: name its JSON file by --tokenizer")
    try:
        return FileTokenizer(Path(name))
    except ValueError as error:
        raise InputError(str(error)) from error
