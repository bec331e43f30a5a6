import os

# On some virtual machines, AMX gives other bfloat16 results from run to run, and sometimes NaN.
# oneDNN reads this when it is first used.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

from small_training import digits, folder  # noqa: F401  (fixtures)
