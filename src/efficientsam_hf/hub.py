"""Folders ready for the Hugging Face Hub, and the checkpoint that comes with the package."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASK_GENERATION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from yaml import YAMLError

from .configuration_efficientsam import EfficientSamConfig
from .exported.manifest import is_exported
from .exported.model import ExportedEfficientSam
from .modeling_efficientsam import EfficientSamModel
from .processing_efficientsam import EfficientSamProcessor
from .written_files import written_beside

# By which names a model may be asked for, and where transformers notes who answers.
MAPPINGS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForMaskGeneration": MODEL_FOR_MASK_GENERATION_MAPPING,
    "AutoModelForPreTraining": MODEL_FOR_PRETRAINING_MAPPING,
    "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "AutoBackbone": MODEL_FOR_BACKBONE_MAPPING,
}

# What the Hub files a model by, unless the card says otherwise. A licence is its author's to choose.
CARD_DATA = {
    "library_name": "transformers",
    "pipeline_tag": "mask-generation",
    "tags": ["efficientsam", "segment-anything"],
}
# What a model is for, by the Auto class that finds it; one of no other class gives features.
TASKS = {"AutoModelForMaskGeneration": "mask-generation", "AutoModelForImageClassification": "image-classification"}
FEATURES = "image-feature-extraction"

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_CHECKPOINT = "efficientsam-nano-512"


def default_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package, for every `from_pretrained`.

    Raises:
        FileNotFoundError: if the package was installed without its data.
    """
    folder = CHECKPOINTS / DEFAULT_CHECKPOINT
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"wanted the package's default checkpoint, found no {missing[0]} in {folder}")
    return folder


def load_checkpoint(
    source: str | Path | None = None, device: str | torch.device | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[Any, EfficientSamProcessor]:
    """A model ready to predict, and its processor.

    Args:
        source: Folder or Hub id; the checkpoint that comes with the package if None. A folder that
            `efficientsam export` wrote gives an `ExportedEfficientSam`, anything else an `EfficientSamModel`.
        device: Where to; CUDA or Apple's GPU if there is one, else the CPU, if None. An exported folder's runtime has
            its own names for devices.
        dtype: Of the weights; "auto" is the checkpoint's own, but float32 on a CPU, which is slow or wrong in float16.

    Raises:
        ValueError: if `source` holds another kind of model, or not all of the weights; if there is no such device; if
            an exported folder's files are not what was exported, or its runtime or device is not installed.
        OSError: if there is no such folder or Hub id.
    """
    source = str(default_checkpoint() if source is None else source)
    if is_exported(source):
        if dtype != "auto":
            raise ValueError(f"{source}: an exported folder keeps its dtype, found dtype={dtype}")
        exported = ExportedEfficientSam(source, devices=None if device is None else str(device))
        return exported, EfficientSamProcessor.from_pretrained(source)
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file, wanted a model folder (efficientsam convert makes one of official weights)"
        )
    try:
        found = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        fault = "its config cannot be read" if Path(source).is_dir() else "no such model folder, and none from the Hub"
        raise OSError(f"{source}: {fault}: {str(error).strip()}") from error
    if found != EfficientSamConfig.model_type:
        raise ValueError(f"{source} holds a model of type {found!r}, wanted {EfficientSamConfig.model_type!r}")
    device = find_device(fastest_device() if device is None else device)
    dtype = torch.float32 if dtype == "auto" and device.type == "cpu" else dtype
    model = load_weights(source, dtype).to(device)
    return model.eval(), EfficientSamProcessor.from_pretrained(source)


def load_weights(source: str | Path, dtype: torch.dtype | str) -> EfficientSamModel:
    """A model with all of its weights, on the CPU.

    Raises:
        ValueError: if they cannot be read, or some are missing.
        OSError: if there is no such folder or Hub id.
    """
    try:
        model, report = EfficientSamModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as fault:
        raise ValueError(f"{source}: its weights cannot be read: {str(fault).splitlines()[0]}") from fault
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{source} lacks weights: found none for {len(missing)}, as {missing[0]}")
    return model


def fastest_device() -> torch.device:
    """CUDA or Apple's GPU if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def find_device(device: str | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("wanted one that has memory")
        return found
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: no such device here: {str(error).splitlines()[0]}") from error


def save_for_hub(
    model: PreTrainedModel,
    processor: ProcessorMixin | BaseImageProcessor,
    folder: str | Path,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that loads with `trust_remote_code=True` where this package is not installed.

    In it are the weights, the configs, and every file of code that they need. The folder appears whole or not at all.

    Args:
        model: Any model of this package; all Auto classes that find it here will find it there.
        processor: A processor, or an image processor for models without prompts.
        folder: Where to; new or empty.
        card: Markdown for README.md; front matter that it lacks is put above it.
        overwrite: Take away all that is in `folder`, once the new one is complete.

    Raises:
        FileExistsError: if there is something in `folder`.
        ValueError: if no Auto class knows the model.
    """
    names = auto_names(model)
    with written_beside(Path(folder).resolve(), overwrite) as beside:
        # Saving notes a single Auto class for each object, but keeps what was noted before: all of the model's here,
        # and nothing from an earlier save.
        model.config.auto_map = dict.fromkeys(names, f"{module_name(model)}.{type(model).__name__}")
        processor.auto_map = {}
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        if card is not None:
            (beside / "README.md").write_text(
                with_front_matter(card, TASKS.get(names[-1], FEATURES)), encoding="utf-8"
            )
    return Path(folder)


def push_to_hub(
    model: PreTrainedModel,
    processor: ProcessorMixin | BaseImageProcessor,
    repo_id: str,
    card: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload EfficientSAM",
) -> str:
    """Upload what `save_for_hub` writes, as one commit; the repository is made if there is none.

    Args:
        model: As for `save_for_hub`.
        processor: As for `save_for_hub`.
        repo_id: `name` or `organization/name`.
        card: As for `save_for_hub`; without one, a README.md that is there stays.
        private: Whether a new repository is; None leaves it to the account's or the organization's setting.
        token: A token, True for the one that `hf auth login` stored, None for that one if there is one.
        revision: Branch to commit to, made if there is none.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: First line of the commit.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ValueError: before anything is uploaded, without a token, and for a repository of something else.
    """
    api = HfApi(token=token)
    check_repository(api, repo_id)
    with tempfile.TemporaryDirectory() as room:
        folder = save_for_hub(model, processor, Path(room) / "model", card)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def check_repository(api: HfApi, repo_id: str) -> None:
    """Refuse what would fail, or overwrite something else, before anything is made or uploaded.

    Raises:
        ValueError: without a token that the Hub knows, and for a name of a data set, a Space, or another model.
    """
    if repo_id.count("/") > 1 or ":" in repo_id:
        raise ValueError(f"wanted `name` or `owner/name` of a model repository, found {repo_id!r}")
    try:
        owner = api.whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise ValueError("no token of the Hub: wanted one by `hf auth login`, in HF_TOKEN, or given here") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError("the Hub does not know this token: wanted a valid one that may write") from error
        raise
    repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    if not api.repo_exists(repo_id):
        others = [kind for kind in ("dataset", "space") if api.repo_exists(repo_id, repo_type=kind)]
        if others:
            raise ValueError(f"{repo_id} is a {others[0]}, wanted a model repository or a name that is free")
        return
    found = (api.model_info(repo_id).config or {}).get("model_type", EfficientSamConfig.model_type)
    if not found.startswith(EfficientSamConfig.model_type):
        raise ValueError(f"{repo_id} holds a model of type {found!r}: wanted a new repository, or one of EfficientSAM")


def auto_names(model: PreTrainedModel) -> list[str]:
    """The Auto classes that give this model's class for its config.

    Raises:
        ValueError: if there is none.
    """
    names = [name for name, mapping in MAPPINGS.items() if mapping.get(type(model.config), None) is type(model)]
    if not names:
        raise ValueError(f"wanted a model registered with one of {', '.join(MAPPINGS)}, found {type(model).__name__}")
    return names


def module_name(model: PreTrainedModel) -> str:
    """The file that defines the model's class, as the Hub knows it: without packages above it, without `.py`."""
    return type(model).__module__.rpartition(".")[2]


def with_front_matter(text: str, task: str = TASKS["AutoModelForMaskGeneration"]) -> str:
    """The card with all of `CARD_DATA`, and its task, in its front matter; what its author wrote there stays."""
    try:
        card = ModelCard(text if text.startswith("---") else f"---\nlibrary_name: transformers\n---\n\n{text}")
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the front matter of the card (README.md) is no YAML: {reason}") from error
    for key, value in {**CARD_DATA, "pipeline_tag": task}.items():
        if card.data.get(key) is None:
            card.data[key] = value
    return str(card)


__all__ = ["default_checkpoint", "load_checkpoint", "push_to_hub", "save_for_hub"]
