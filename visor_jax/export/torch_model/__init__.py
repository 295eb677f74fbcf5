"""The PyTorch module of an export, for use without remote code.

`VisorForConditionalGeneration.from_pretrained(DIR)` loads a folder that `visor export` wrote; `VisorProcessor` makes
its inputs from pictures and a question. Every export contains the other files of this folder.
"""

from .configuration_visor import VisorConfig
from .modeling_visor import VisorForConditionalGeneration
from .processing_visor import VisorProcessor

__all__ = ["VisorConfig", "VisorForConditionalGeneration", "VisorProcessor"]
