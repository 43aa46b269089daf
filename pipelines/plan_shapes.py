"""The sizes of the networks of a job, before anything is loaded. Loads no torch.

A test compares the tiny ones with `pipelines.tiny`, which imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from xicon_infer import formulas, formulas_vae
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import VaeShape
from xicon_infer.job import Job

TINY_DIT = DitShape(
    128, 256, 2, 1, 20, image_tokens=17, pose_channels=20, text_dim=64, image_dim=64
)
TINY_SCAIL = replace(TINY_DIT, dim=256, ffn_dim=768, layers=6, heads=2)
"""The trained one of `pipelines.tiny_trained`."""
TINY_DITS: Mapping[str, DitShape] = MappingProxyType(
    {
        "scail": TINY_SCAIL,
        "steady_dancer": replace(TINY_DIT, in_channels=36, pose_channels=0),
        "wan_i2v": replace(TINY_DIT, in_channels=36, pose_channels=0),
        "wan_t2v": replace(TINY_DIT, in_channels=16, pose_channels=0, image_tokens=0),
    }
)
TINY_VAE = VaeShape(base=16)
TINY_SCAIL_VAE = VaeShape(base=24, blocks=1)

_DITS: Mapping[str, DitShape] = MappingProxyType(
    {
        "scail": formulas.SCAIL_14B,
        "steady_dancer": formulas.WAN_I2V_14B,
        "wan_i2v": formulas.WAN_I2V_14B,
        "wan_t2v": formulas.WAN_T2V_14B,
    }
)
_FP8_PRESETS = ("fp8", "fp8-720p", "flf2v-fp8", "low-memory")


@dataclass(frozen=True)
class Sizes:
    """What the stages of a job depend on.

    dit, vae: the networks. width, height: of the result, pixels. num_frames: F. matrix_bytes: of a
    block weight in the file. element_bytes: of a number of the computation.
    """

    dit: DitShape
    vae: VaeShape
    width: int
    height: int
    num_frames: int
    matrix_bytes: int
    element_bytes: int

    @property
    def frame_tokens(self) -> int:
        """Returns the tokens of one latent frame."""
        return formulas.frame_tokens(self.width, self.height)


def sizes_of(job: Job, width: int, height: int, num_frames: int) -> Sizes:
    """Returns the sizes of a sampling job whose result is that large and long."""
    tiny = job.preset == "tiny"
    # Nothing is loaded that could tell the device: real weights are for a GPU, the tiny ones not.
    on_cpu = job.device == "cpu" or (job.device == "auto" and tiny)
    element = 4 if job.dtype == "fp32" or (job.dtype == "auto" and on_cpu) else 2
    return Sizes(
        dit=dit_of(job),
        vae=vae_of(job),
        width=width,
        height=height,
        num_frames=num_frames,
        matrix_bytes=1 if job.preset in _FP8_PRESETS else element,
        element_bytes=element,
    )


def vae_of(job: Job) -> VaeShape:
    """Returns the VAE of a job."""
    if job.preset != "tiny":
        return formulas_vae.WAN_VAE
    return TINY_SCAIL_VAE if job.pipeline == "scail" else TINY_VAE


def dit_of(job: Job) -> DitShape:
    """Returns the transformer of a job."""
    if job.preset == "tiny":
        return TINY_DITS[job.pipeline]
    if job.preset == "1.3b":
        return formulas.WAN_T2V_1_3B
    shape = _DITS[job.pipeline]
    both = job.preset.startswith("flf2v")
    return replace(shape, image_tokens=2 * formulas.CLIP_TOKENS) if both else shape
