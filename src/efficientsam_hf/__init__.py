"""EfficientSAM for the Hugging Face world."""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskGeneration,
    AutoModelForPreTraining,
    AutoProcessor,
)

# Not from the top: there transformers 5.17 has stand-ins for them that ask for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .compilation import compile_model
from .configuration_efficientsam import (
    VARIANTS,
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamVisionConfig,
)
from .configuration_efficientsam_sami import MAE_BASELINE, EfficientSamSamiConfig, EfficientSamSamiDecoderConfig
from .cuda_graphs import record_model
from .exported.model import ExportedEfficientSam
from .hub import default_checkpoint, load_checkpoint, push_to_hub, save_for_hub
from .image_processing_efficientsam import EfficientSamImageProcessor
from .interchange import to_supervision
from .mask_generation import segment_everything
from .modeling_efficientsam import EfficientSamModel, EfficientSamVisionModel
from .modeling_efficientsam_backbone import EfficientSamBackbone, EfficientSamForImageClassification
from .modeling_efficientsam_sami import EfficientSamForPreTraining
from .pictures_efficientsam import read_photo
from .prediction import Segmentation, segment
from .prediction_stream import SegmentationStream
from .processing_efficientsam import EfficientSamProcessor
from .visualization import draw_everything, draw_records, draw_segmentation

try:
    __version__ = version("efficientsam-hf")
except PackageNotFoundError:  # a source tree on the path that nobody has installed
    __version__ = "0+unknown"

# What transformers' Auto classes find. An `exist_ok` keeps the import alive should a later transformers bring a model
# of the same name; ours is then the one found.
for config_class in (
    EfficientSamConfig,
    EfficientSamVisionConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamSamiConfig,
    EfficientSamSamiDecoderConfig,
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

AutoModel.register(EfficientSamConfig, EfficientSamModel, exist_ok=True)
AutoModel.register(EfficientSamVisionConfig, EfficientSamVisionModel, exist_ok=True)
AutoBackbone.register(EfficientSamVisionConfig, EfficientSamBackbone, exist_ok=True)
AutoModelForImageClassification.register(EfficientSamVisionConfig, EfficientSamForImageClassification, exist_ok=True)
AutoModelForMaskGeneration.register(EfficientSamConfig, EfficientSamModel, exist_ok=True)
AutoModelForPreTraining.register(EfficientSamSamiConfig, EfficientSamForPreTraining, exist_ok=True)

# One class serves both of transformers' backends.
BACKENDS = dict.fromkeys(("pil", "torchvision"), EfficientSamImageProcessor)
AutoImageProcessor.register(EfficientSamConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoImageProcessor.register(EfficientSamVisionConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoImageProcessor.register(EfficientSamSamiConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor, exist_ok=True)
# None for videos: unless that is known, pipelines ask whether to run the code beside the weights, to look for one.
for config_class in (EfficientSamConfig, EfficientSamVisionConfig, EfficientSamSamiConfig):
    AutoVideoProcessor.register(config_class, None, exist_ok=True)

# What `save_pretrained` and `push_to_hub` write then carries its own code, so that those who lack this package can
# load it with trust_remote_code=True. Each class is noted for one Auto class; `hub.save_for_hub` notes all.
EfficientSamModel.register_for_auto_class("AutoModelForMaskGeneration")
EfficientSamForPreTraining.register_for_auto_class("AutoModelForPreTraining")
EfficientSamBackbone.register_for_auto_class("AutoBackbone")
EfficientSamForImageClassification.register_for_auto_class("AutoModelForImageClassification")
for own_class in (
    EfficientSamConfig,
    EfficientSamVisionConfig,
    EfficientSamSamiConfig,
    EfficientSamVisionModel,
    EfficientSamImageProcessor,
    EfficientSamProcessor,
):
    own_class.register_for_auto_class()

__all__ = [
    "MAE_BASELINE",
    "VARIANTS",
    "EfficientSamBackbone",
    "EfficientSamConfig",
    "EfficientSamForImageClassification",
    "EfficientSamForPreTraining",
    "EfficientSamImageProcessor",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamModel",
    "EfficientSamProcessor",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamSamiConfig",
    "EfficientSamSamiDecoderConfig",
    "EfficientSamVisionConfig",
    "EfficientSamVisionModel",
    "ExportedEfficientSam",
    "Segmentation",
    "SegmentationStream",
    "__version__",
    "compile_model",
    "default_checkpoint",
    "draw_everything",
    "draw_records",
    "draw_segmentation",
    "load_checkpoint",
    "push_to_hub",
    "read_photo",
    "record_model",
    "save_for_hub",
    "segment",
    "segment_everything",
    "to_supervision",
]
