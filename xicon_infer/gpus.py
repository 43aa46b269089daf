"""Named graphics cards: how much memory they have, what they can multiply, how fast copies arrive.

For plans of a job on a card that is not in this machine. Memory is the total that `nvidia-smi`
prints, in MiB, collected from public logs and not measured by this project; cards with error
correction switched on show less than the round number in their name. What the driver and the CUDA
context take of it is subtracted by the plan.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from xicon_infer.errors import InvalidRequest

MIB = 2**20
GIB = 2**30
LARGEST_GB = 1024


@dataclass(frozen=True)
class Gpu:
    """One kind of card.

    memory_bytes: total, as the driver reports it. capability: of its arithmetic, (major, minor);
    None if unknown. pcie: generation of its bus. spellings: other ways to write the name.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int] | None
    pcie: int
    spellings: tuple[str, ...] = ()

    @property
    def fp8(self) -> bool:
        """Returns True if its tensor cores multiply fp8; False where that is not known."""
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def bf16(self) -> bool:
        """Returns True if its tensor cores multiply bfloat16, or if that is not known."""
        return self.capability is None or self.capability >= (8, 0)


def _card(name: str, mib: int, capability: tuple[int, int], pcie: int, *spellings: str) -> Gpu:
    return Gpu(name, mib * MIB, capability, pcie, spellings)


GPUS: tuple[Gpu, ...] = (
    _card("T4", 15360, (7, 5), 3),
    _card("RTX 5080", 16303, (12, 0), 5),
    _card("RTX A4000", 16376, (8, 6), 4),
    _card("RTX 4070 Ti Super", 16376, (8, 9), 4),
    _card("RTX 4080", 16376, (8, 9), 4, "RTX 4080 Super"),
    _card("V100 16GB", 16384, (7, 0), 3),
    _card("L4", 23034, (8, 9), 4),
    _card("RTX 4090", 24564, (8, 9), 4, "RTX 4090 D"),
    _card("RTX A5000", 24564, (8, 6), 4),
    _card("RTX 3090", 24576, (8, 6), 4, "RTX 3090 Ti"),
    _card("RTX 5090", 32607, (12, 0), 5),
    _card("V100 32GB", 32768, (7, 0), 3),
    _card("A100 40GB", 40960, (8, 0), 4, "A100 SXM4 40GB", "A100 PCIe 40GB"),
    _card("A40", 46068, (8, 6), 4),
    _card("L40", 46068, (8, 9), 4),
    _card("L40S", 46068, (8, 9), 4),
    _card("RTX A6000", 49140, (8, 6), 4),
    _card("H100 80GB", 81559, (9, 0), 5, "H100", "H100 SXM", "H100 PCIe", "H100 80GB HBM3"),
    _card("A100 80GB", 81920, (8, 0), 4, "A100 SXM4 80GB", "A100 PCIe 80GB", "A100 80GB PCIe"),
    _card("H100 NVL", 95830, (9, 0), 5, "H100 94GB"),
    _card("H200", 143771, (9, 0), 5, "H200 141GB", "H200 SXM", "H200 NVL"),
    _card("B200", 183359, (10, 0), 5, "B200 180GB", "B200 192GB"),
)
"""By memory, smallest first."""

# Words that makers, sellers and drivers put before or behind the name.
_FILLERS = re.compile(r"nvidia|geforce|quadro|tesla|generation|graphics|\bgpu\b|\bada\b|[^a-z0-9]")
_PREFIX = re.compile(r"^rtx")
_SIZE = re.compile(r"\s*(\d{1,4})\s*(?:g|gb|gib)(?:\s*(?:gpu|card|vram))?\s*", re.IGNORECASE)


def find_gpu(text: str) -> Gpu:
    """Returns the card of that name, or a nameless one for a size such as "24GB".

    Case, blanks, hyphens, maker and "RTX" do not matter: "nvidia geforce rtx-4090", "4090".

    Args:
        text: a name or a size.

    Raises:
        InvalidRequest: no such card; names the nearest. Or the name belongs to several.
    """
    if size := _SIZE.fullmatch(text):
        return _nameless(int(size[1]), text)
    wanted = _plain(text)
    exact = [gpu for gpu in GPUS if wanted in {_plain(name) for name in (gpu.name, *gpu.spellings)}]
    if exact:
        return exact[0]
    started = [gpu for gpu in GPUS if wanted and _plain(gpu.name).startswith(wanted)]
    if len(started) == 1:
        return started[0]
    near = started or _nearest(wanted)
    names = ", ".join(gpu.name for gpu in near or GPUS)
    raise InvalidRequest(
        f"'gpu' must be the name of a card or a size such as '24GB', got {text!r}; "
        f"{'did you mean' if near else 'known are'}: {names}",
        field="gpu",
    )


def _nameless(size: int, text: str) -> Gpu:
    if not 1 <= size <= LARGEST_GB:
        raise InvalidRequest(
            f"'gpu' must be a size from 1GB to {LARGEST_GB}GB, or a name, got {text!r}",
            field="gpu",
        )
    return Gpu(f"{size} GB", size * GIB, None, 4)


def _plain(name: str) -> str:
    return _PREFIX.sub("", _FILLERS.sub("", name.lower()))


def _nearest(wanted: str) -> list[Gpu]:
    """Returns the cards with the most similar names, the best first."""
    names = {_plain(gpu.name): gpu for gpu in GPUS}
    return [names[name] for name in difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)]
