from . import environment  # noqa: F401  before the libraries that it prepares

# isort: split
from .configuration_qwen2_vla import Qwen2VLAConfig
from .modeling_qwen2_vla import Qwen2VLForConditionalGenerationForVLA
from .policy import Qwen2VLAPolicy
from .processing_qwen2_vla import Qwen2VLAProcess
from .trainer import QWen2VLATrainer

__all__ = [
    "QWen2VLATrainer",
    "Qwen2VLAConfig",
    "Qwen2VLAPolicy",
    "Qwen2VLAProcess",
    "Qwen2VLForConditionalGenerationForVLA",
]
