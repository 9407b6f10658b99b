"""Helpers behind the MMedPO notebooks: clinical-aware preference optimisation of medical
vision-language models.
"""

import logging

__version__ = "0.1.0"

# On a CPU, bitsandbytes reports at import that an optional kernel for 4-bit matrices is missing. It
# does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
