"""Names that several rooms share: prefixes, file names, configuration keys."""

PREFIX = "memwrap_"
BASELINE_PREFIX = "memwrap_baseline_"
EVIDENCE_PREFIX = "memwrap_evidence_"

WEIGHTS_FILE = "model.safetensors"
# Of a repository that holds a memory for weights elsewhere. By another name, no loader takes it for a whole model.
MEMORY_FILE = "memory.safetensors"
CONFIG_FILE = "config.json"

# Names of the submodules of a Memory Wrap model: they are prefixes in its state dict and so part of the file format.
BACKBONE = "backbone"
HEAD = "head"
MEMORY_BANK = "memory_bank"

# Key of the block in config.json that tells people what the memory holds. The truth is in the bank's buffers.
MEMORY_CONFIG_KEY = "memory_bank"

BANK_FORMAT_VERSION = 1
# Version of that block, and of what `config.json` means to this package.
CONFIG_FORMAT_VERSION = 1

CARD_FILE = "README.md"
CARD_FIGURE_FILE = "explanation.png"
