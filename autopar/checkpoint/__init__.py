"""Parameters and training state on disk: checkpoints, safetensors files, initialisation of a meta model."""
