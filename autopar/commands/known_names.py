"""Names that --help lists, of things in files that import torch, which --help does not; a test compares them."""

FAMILIES = ("decoder", "moe", "encoder", "encoder-decoder", "audio", "vision", "state-space")  # autopar.zoo
FORMATS = ("pt2", "onnx", "chakra", "trace")  # autopar.exporters.export, as the two below
WEIGHTS = ("safetensors", "reference", "none")
DIALECTS = ("autopar", "tensorrt")
OPTIMIZERS = (  # autopar.memory.optimizers
    "adamw", "adam", "adam-amsgrad", "adam8bit", "adafactor", "adagrad", "rmsprop", "sgd", "sgd-momentum",
)  # fmt: skip
