"""Push a packed model with its card, report and results to the Hub, in one commit."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

from hfq.errors import CheckpointError, ConfigError, HfqError
from hfq.integrations import card as cards
from hfq.integrations.results import Results

__all__ = ["keep_card", "push_folder", "push_to_hub"]


def push_to_hub(
    model: Any, repo_id: str, *, processor: Any = None, results: Results | None = None, private: bool | None = None,
    token: str | bool | None = None, revision: str | None = None, create_pr: bool = False,
    commit_message: str = "Upload quantized model", **save_options: Any,
) -> str:
    """Save ``model`` and push it: packed weights, config, card, report, tokenizer.

    ``model.push_to_hub(repo_id)`` of a packed model does the same.

    Args:
        model: a model that hfq packed, with ``save_pretrained``.
        repo_id: ``"name"`` or ``"organisation/name"``; created if it does not exist.
        processor: tokenizer or processor; the one that belongs to ``model.name_or_path`` by default, if it is found.
        results: measured numbers for the card.
        private, token, revision, create_pr, commit_message: as in ``huggingface_hub``.
        save_options: passed to ``save_pretrained`` (``max_shard_size``, ...).

    Returns:
        Address of the commit.

    Raises:
        ConfigError: the model is not packed by hfq.
        HfqError: the Hub refused or cannot be reached.
    """
    from hfq.integrations import environment, saving

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if str(getattr(config, "quant_method", "")) != "hfq":
        raise ConfigError(f"{type(model).__name__} is not packed by hfq: quantize it first, or use its own push_to_hub")
    if processor is None:
        processor = environment.load_processor(model, config, "text")
    with tempfile.TemporaryDirectory(prefix="hfq-push-") as scratch:
        folder = Path(scratch) / "model"
        saving.save(model, folder, processor=processor, extra=lambda f: _write(f, repo_id, results), **save_options)
        return push_folder(folder, repo_id, private=private, token=token, revision=revision, create_pr=create_pr,
                           commit_message=commit_message)


def push_folder(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | bool | None = None,
    revision: str | None = None, create_pr: bool = False, commit_message: str = "Upload quantized model",
) -> str:
    """Push the folder of a saved packed model as it is; a missing card is written first.

    Raises:
        CheckpointError: the folder holds no packed model.
        HfqError: the Hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    card = cards.folder_card(folder, repo_id)  # also checks that this is a packed model
    if not (Path(folder) / "README.md").exists():
        card.save(Path(folder) / "README.md")
    if not list(Path(folder).glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no safetensors file: save the model there first")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                                 commit_message=commit_message)
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "log in with `hf auth login`, or pass token=..."
        raise HfqError(f"pushing to {repo_id!r} failed, {first}; {hint}") from error
    return str(info)


def keep_card(model: Any) -> None:
    """Make ``model.push_to_hub`` push hfq's card: the library's own would overwrite it with a generic one."""
    if hasattr(type(model), "push_to_hub"):
        model.push_to_hub = _Push(model)


class _Push:
    """The method of one model; holds it weakly, so that a model that goes out of use is freed at once."""

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, *args: Any, **options: Any) -> str:
        return _push_method(self.model(), *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Push:
        return _Push(memo.get(id(self.model()), self.model()))

    def __reduce__(self) -> Any:
        return _Push, (self.model(),)


def _push_method(model: Any, repo_id: str, **options: Any) -> str:
    """``PreTrainedModel.push_to_hub`` for a packed model, with its arguments."""
    config = getattr(model.config, "quantization_config", None)
    own = {"commit_description", "tags"} & set(options)
    if str(getattr(config, "quant_method", "")) != "hfq" or own:
        return type(model).push_to_hub(model, repo_id, **options)
    return push_to_hub(model, repo_id, **{key: value for key, value in options.items() if value is not None})


def _write(folder: Path, repo_id: str, results: Results | None) -> None:
    cards.write_card(folder, repo_id, results)
