"""What a worker makes sure of before it takes a job: the same checks that `doctor` shows.

`run_checks` looks at the machine through `Probes`, cheapest first, and returns one result each; it
raises nothing and loads no model. What a GPU is needed for is left out where there is none: the
one result that says so is enough. PyTorch is imported by the probes that need it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xicon_infer.checks_gpu import gpu_checks
from xicon_infer.checks_machine import machine_checks
from xicon_infer.checks_probes import REAL, GpuFacts, Probes
from xicon_infer.checks_types import Outcome, State
from xicon_infer.checks_weights import weights_checks
from xicon_infer.errors import XiconError
from xicon_infer.job_profiles import PRESETS
from xicon_infer.request_field import PIPELINES
from xicon_infer.request_job import MEMORY
from xicon_infer.settings import Settings
from xicon_infer.settings_table import MODES
"""placeholder"""
