"""The RunPod worker: everything it does is in `xicon_infer.worker` and its neighbours.

    python handler.py                          on the platform, or with a test_input.json here
    python handler.py --test_input '{"input": {...}}'
    python handler.py --rp_serve_api           the SDK's local API on port 8000

Nothing runs when this file is imported: the SDK's heartbeat may be a process of its own, which
executes it again (docs/worker.md).
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Starts the worker and returns the exit code."""
    # The SDK's own default writes whole answers, with their links, into the log.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    import runpod

    from xicon_infer.worker_start import run_worker

    return run_worker(runpod.serverless, env=os.environ, argv=sys.argv)


if __name__ == "__main__":
    sys.exit(main())
