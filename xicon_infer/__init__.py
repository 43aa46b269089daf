"""Direct-PyTorch video generation: a reference image and a dance become a new video.

Importing this package loads neither torch nor any model library.
"""

from __future__ import annotations

from xicon_infer.errors import XiconError
from xicon_infer.types import Clip, Result, Track

__version__ = "0.1.0"

__all__ = ["Clip", "Result", "Track", "XiconError", "__version__"]
