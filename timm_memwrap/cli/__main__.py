"""`python -m timm_memwrap.cli`, for torchrun."""

import sys

from timm_memwrap.cli import main

sys.exit(main())
