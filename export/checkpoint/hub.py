"""Finds a checkpoint: a local folder, or a model of the Hugging Face hub.

What huggingface_hub reads from the environment holds here too: ``HF_TOKEN``, ``HF_HOME``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from edge_llm.errors import ArgumentError, CheckpointError
from edge_llm.huggingface.model_card import read_license

from .weights import INDEX, SINGLE, read_index

__all__ = ["Checkpoint", "resolve"]

# Never pickles, and of several copies of the weights only the one that transformers would load.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "README.md",
    "LICENSE*",
    SINGLE,
    INDEX,
)

# HfHubHTTPError's first base is the HTTP library's own base of errors, whichever library this
# version of huggingface_hub uses; its downloader in Rust raises RuntimeError.
_TRANSFER_ERRORS: tuple[type[BaseException], ...] = (
    HfHubHTTPError.__bases__[0],
    OSError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files are on this machine.

    Attributes:
        path: The folder.
        repo: The hub's name for it, such as "HuggingFaceTB/SmolLM2-135M"; None for a local folder.
        revision: The commit that was fetched, 40 hexadecimal digits; None for a local folder.
        license: The licence that README.md states, if it does.
    """

    path: Path
    repo: str | None
    revision: str | None
    license: str | None


def resolve(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> Checkpoint:
    """Find a checkpoint, fetching from the hub what an export needs and the cache lacks.

    Args:
        source: A folder, or a hub id such as ``owner/name``; a folder wins.
        revision: Branch, tag or commit on the hub (default: its main branch).
        token: The hub's access token (default: ``HF_TOKEN``, or that of ``hf auth login``).

    Raises:
        ArgumentError: ``source`` is empty, or ``revision`` is given with a folder.
        CheckpointError: The folder, the model or the revision does not exist, may not be read,
            or cannot be fetched.
    """
    if not str(source):
        raise ArgumentError("source", "a folder or a hub id such as owner/name", source)
    if Path(source).is_dir():
        if revision is not None:
            raise ArgumentError(
                "revision", f"left out with a local folder ({source})", revision, "Leave it out."
            )
        return Checkpoint(Path(source), None, None, read_license(Path(source)))
    if isinstance(source, Path) or _looks_local(source):
        raise CheckpointError(
            f"{source} is not a folder that exists.",
            "Give the folder that holds config.json, or a hub id such as owner/name.",
        )
    path = _fetch(source, revision, token, _FILES)
    commit = path.name
    if not (path / SINGLE).is_file() and (index := read_index(path)):
        shards = sorted(set(index.values()))
        _fetch(source, commit, token, tuple(glob.escape(shard) for shard in shards))
        _check_complete(path, source, shards)
    elif not (path / SINGLE).is_file():
        raise CheckpointError(
            f"{source} at {commit} has neither {SINGLE} nor {INDEX}"
            + (" in the cache." if constants.HF_HUB_OFFLINE else "."),
            "Pickled weights are refused, for they can run code: if the model has no others, "
            "convert them with transformers' save_pretrained(folder, safe_serialization=True) and "
            "export that folder.",
        )
    _check_complete(path, source, ["config.json"])
    return Checkpoint(path, source, commit, read_license(path))


def _looks_local(source: str) -> bool:
    return source[0] in "./~" or source[-1] == "/" or "\\" in source or source.count("/") > 1


def _fetch(repo: str, revision: str | None, token: str | None, files: tuple[str, ...]) -> Path:
    """Fetch the files that match; the folder's name is the commit."""
    at = f"{repo} at {revision}" if revision else repo
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        return Path(
            snapshot_download(repo, revision=revision, token=token, allow_patterns=list(files))
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder that exists nor a hub id.", "Write owner/name."
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: its owner gives access on request.",
            f"Accept its terms on {page}, then set HF_TOKEN or run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no model {repo} on {constants.ENDPOINT}, or it is private.",
            "Check the spelling; for a private model, set HF_TOKEN or run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}.",
            f"Its branches, tags and commits are listed on {page}/tree/main",
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{at} is not wholly in the cache ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE forbids fetching it.",
                "Unset HF_HUB_OFFLINE once, or give a local folder.",
            ) from error
        raise CheckpointError(
            f"{at} is not wholly in the cache, and {constants.ENDPOINT} could not be reached: "
            f"{_first_line(error.__cause__ or error)}.",
            "Check the network, HF_ENDPOINT and HF_TOKEN, and try again; or give a local folder.",
        ) from error
    except _TRANSFER_ERRORS as error:
        raise CheckpointError(
            f"Fetching {at} from {constants.ENDPOINT} failed: {_first_line(error)}.",
            "Check the network, the disk, HF_ENDPOINT and HF_TOKEN, and try again; what was "
            "fetched is kept.",
        ) from error


def _check_complete(path: Path, repo: str, names: list[str]) -> None:
    """Without a network, an earlier and interrupted fetch looks like a whole one."""
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{repo} at {path.name} lacks {', '.join(missing[:3])}"
            + (" in the cache." if constants.HF_HUB_OFFLINE else "."),
            "Run again with a network; if that does not help, the model is incomplete on the hub.",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
